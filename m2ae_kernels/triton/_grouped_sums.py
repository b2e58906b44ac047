"""Sums over the rows of each group, in Triton: gradients of biases, and what they are made of.

A kernel over row tiles leaves each tile's sum, [row tiles, C] in float32; these are added up in
their order, group by group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2ae_kernels.ops._activations import is_glu
from m2ae_kernels.triton._activations import activated, constants_of, slope
from m2ae_kernels.triton._device import is_interpreted
from m2ae_kernels.triton._grouped_tiles import (
    groups_of,
    lanes_of,
    tile_of_program,
    tiles_of_rows,
)
from m2ae_kernels.triton._numbers import float32_of, rounded_to
from m2ae_kernels.triton._tiles import sum_over_tiles

BLOCK_M, BLOCK_C = 32, 64  # of the kernel that goes over rows
COLUMNS, ADDED = 64, 32  # of a program that adds up tiles; tiles at once


@triton.jit(do_not_specialize=["N"])
def group_sums_kernel(
    parts_ptr,  # float32 [row tiles, C]
    out_ptr,  # [E, C]
    ends_ptr,  # int32 [E], or None: E groups of N rows each
    N,
    E,
    C,
    BLOCK_M: tl.constexpr,  # of the tiles
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADDED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # One program owns some columns of one group.
    group = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tiles = tl.cdiv(N, BLOCK_M)
    before = group * tiles
    if ends_ptr is not None:
        _, _, of_groups = groups_of(ends_ptr, N, E, BLOCK_M, GROUPS)
        lane = tl.arange(0, GROUPS)
        before = tl.sum(tl.where(lane < group, of_groups, 0), 0)
        tiles = tl.sum(tl.where(lane == group, of_groups, 0), 0)
    parts = parts_ptr + before.to(tl.int64) * C
    total = sum_over_tiles(parts, tiles, C, c, c < C, tl.zeros([COLUMNS], tl.float32), ADDED)
    total = rounded_to(total, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + group.to(tl.int64) * C + c, total, mask=c < C)


def sum_groups(parts: Tensor, out: Tensor, ends: Tensor | None, N: int, block_m: int) -> None:
    """Write `out`, [E, C], for the sums of tiles of `block_m` rows."""
    E, C = out.shape
    if out.numel() > 0:
        group_sums_kernel[E, triton.cdiv(C, COLUMNS)](
            parts, out, ends, N, E, C, BLOCK_M=block_m, GROUPS=lanes_of(E), COLUMNS=COLUMNS,
            ADDED=ADDED, INTERPRETED=is_interpreted(out),
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def activation_gradient_kernel(
    grad_ptr,  # [N, C] or [E, N, C], strides
    h_ptr,  # contiguous, [N, C or 2 C] or [E, ...]; or None without an activation
    out_ptr,  # of the shape of h, in the dtype to multiply in; or None
    parts_ptr,  # float32 [row tiles, C or 2 C], or None
    ends_ptr,  # int32 [E], or None: E groups of N rows each
    N,
    E,
    C,
    grad_group,
    grad_row,
    grad_column,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # One program owns a tile of `grad`.
    WIDE: tl.constexpr = 2 if GLU else 1
    group, first, end, column, tile = tile_of_program(
        ends_ptr, N, E, C, BLOCK_M, BLOCK_C, GROUPS, 1
    )
    if (first < end) & (group < E):
        row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        c = column + tl.arange(0, BLOCK_C)
        group_64 = group.to(tl.int64)
        at = (grad_ptr + group_64 * grad_group + row * grad_row)[:, None]
        mask = (row < end)[:, None] & (c < C)[None, :]
        at += (c.to(tl.int64) * grad_column)[None, :]
        gradient = float32_of(tl.load(at, mask=mask, other=0.0), INTERPRETED)
        if ends_ptr is None:
            row += group_64 * N
        at = row[:, None] * (WIDE * C) + c[None, :]
        if h_ptr is not None:
            h = float32_of(tl.load(h_ptr + at, mask=mask, other=0.0), INTERPRETED)
            if GLU:
                up = float32_of(tl.load(h_ptr + at + C, mask=mask, other=0.0), INTERPRETED)
                by_up = gradient * activated(h, ACTIVATION)
                gradient *= up
            gradient *= slope(h, ACTIVATION)
        if out_ptr is not None:
            dtype: tl.constexpr = out_ptr.dtype.element_ty
            tl.store(out_ptr + at, rounded_to(gradient, dtype, INTERPRETED), mask=mask)
            if GLU:
                tl.store(out_ptr + at + C, rounded_to(by_up, dtype, INTERPRETED), mask=mask)
        if parts_ptr is not None:
            at_parts = parts_ptr + tile.to(tl.int64) * (WIDE * C) + c
            tl.store(at_parts, tl.sum(gradient, axis=0), mask=c < C)
            if GLU:
                tl.store(at_parts + C, tl.sum(by_up, axis=0), mask=c < C)


def gradient_of_product(
    grad: Tensor,  # [N, C] or [E, N, C]
    h: Tensor | None,  # of the shape of the product
    ends: Tensor | None,  # int32 [E]
    E: int,
    activation: int,
    out: Tensor | None,  # of the shape of the product
    by_bias: Tensor | None,  # [E, C or 2 C]
) -> None:
    """Write `out` and `by_bias`. Rows behind the last group are neither read nor written."""
    N, C = grad.shape[-2:]
    if grad.numel() == 0:
        if by_bias is not None:
            by_bias.zero_()
        return
    tiles = tiles_of_rows(N, E, BLOCK_M) if ends is not None else E * triton.cdiv(N, BLOCK_M)
    wide = 2 * C if is_glu(activation) else C
    parts = None
    if by_bias is not None:
        parts = grad.new_empty(tiles, wide, dtype=torch.float32)
    activation_gradient_kernel[(tiles * triton.cdiv(C, BLOCK_C),)](
        grad, h, out, parts, ends, N, E, C, *(0, *grad.stride())[-3:], **constants_of(activation),
        BLOCK_M=BLOCK_M, BLOCK_C=BLOCK_C, GROUPS=lanes_of(E), INTERPRETED=is_interpreted(grad),
    )  # fmt: skip
    if parts is not None and by_bias is not None:
        sum_groups(parts, by_bias, ends, N, BLOCK_M)
