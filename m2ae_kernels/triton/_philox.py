"""Dropout by Philox4x32-10, the same bits as ops/_philox.py makes."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from m2ae_kernels.ops._philox import dropout_threshold


class Dropout(NamedTuple):
    """What a launch is told of a dropout."""

    seed: Tensor | None  # int64 [2]
    threshold: int  # as int32: Triton would make a 64-bit argument of a number above 2^31
    scale: float  # of what is kept
    constants: dict[str, Any]


def dropout(seed: Tensor | None, p: float, which: int) -> Dropout:
    """Dropout with probability p; `which` is HIDDEN or OUTPUT."""
    drops = p > 0 and seed is not None
    threshold = dropout_threshold(p)
    threshold -= 2**32 if threshold >= 2**31 else 0
    return Dropout(
        seed if drops else None,
        threshold if drops else 0,
        1 / (1 - p) if drops else 1.0,
        {"WHICH": which},
    )


@triton.jit
def dropped(
    values,  # float32 [BLOCK_M, WIDTH]
    slot,  # int32 [BLOCK_M], slot ids
    column,  # first column of the tile, a multiple of 4
    seed_ptr,  # int64 [2]
    threshold,
    scale,
    WHICH: tl.constexpr,
):
    """`values` times 0 or `scale`. Four columns share a counter, so that one makes their words."""
    BLOCK_M: tl.constexpr = values.shape[0]
    WIDTH: tl.constexpr = values.shape[1]
    key = tl.load(seed_ptr)
    offset = tl.load(seed_ptr + 1)
    quad = column // 4 + tl.arange(0, WIDTH // 4)
    zero = tl.zeros([BLOCK_M, WIDTH // 4], tl.uint32)
    a, b, c, d = tl.philox_impl(
        slot.to(tl.uint32)[:, None] + zero,
        zero,
        quad.to(tl.uint32)[None, :] + zero,
        zero + ((offset & 0x7FFFFFFF) * 2 + WHICH).to(tl.uint32),
        (key & 0xFFFFFFFF).to(tl.uint32),
        ((key >> 32) & 0xFFFFFFFF).to(tl.uint32),
        10,
    )
    least = threshold.to(tl.uint32, bitcast=True)
    even = tl.join((a >= least).to(tl.int8), (c >= least).to(tl.int8))
    odd = tl.join((b >= least).to(tl.int8), (d >= least).to(tl.int8))
    kept = tl.reshape(tl.join(even, odd), [BLOCK_M, WIDTH])
    return values * tl.where(kept != 0, scale, 0.0)
