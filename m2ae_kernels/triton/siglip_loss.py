"""siglip_loss in Triton and cuBLAS. Contract and math: m2ae_kernels/ops/siglip_loss.py

One kernel makes losses and gradients of logits (_siglip_loss_tiles.py), a chunk of rows at a time;
where gradients are asked for, cuBLAS multiplies each chunk with y, and its transpose with x, and
gradients of rows follow (_row_gradients.py). So that the forward that stores gradients takes three
products, one without them one, and the backward that makes the logits again three. Nothing waits
for the device; the same inputs give the same bits.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from m2ae_kernels.triton._device import on_device
from m2ae_kernels.triton._float64 import reference_for_float64
from m2ae_kernels.triton._products import precision_of_products
from m2ae_kernels.triton._row_gradients import (
    Pairs,
    extra_of,
    gradients_of_rows,
    rows_of_chunk,
)
from m2ae_kernels.triton._rows import Rows, contiguous
from m2ae_kernels.triton._siglip_loss_tiles import row_weights_kernel, siglip_kernel, weigh_kernel
from m2ae_kernels.triton._tiles import Tile, is_diagonal, launch

# Tiles by kind of product and major compute capability, 0 being the interpreter; rows of an odd
# kind are no multiples of 16 bytes. None of them has been timed on a GPU: registers and shared
# memory chose them (tests/test_triton.py shows both). PLAIN is for the loss of normalized
# features; SELECTING for any mask, target, ids or normalization.
INTERPRETED = Tile(32, 64, 32, warps=4, stages=1, group=2)
SELECTING = {
    ("16-bit", 0): INTERPRETED,
    ("16-bit", 8): Tile(64, 128, 64, warps=8, stages=3),
    ("16-bit", 9): Tile(128, 64, 64, warps=8, stages=3),
    ("16-bit", 10): Tile(64, 32, 64, warps=8, stages=3),
    ("16-bit", 12): Tile(64, 128, 64, warps=8, stages=2),
    ("odd 16-bit", 0): INTERPRETED,
    ("odd 16-bit", 8): Tile(64, 32, 32, warps=8, stages=2),
    ("tf32", 0): INTERPRETED,
    ("tf32", 8): Tile(64, 32, 32, warps=8, stages=3),
    ("float32", 0): INTERPRETED,
    ("float32", 8): Tile(32, 64, 32, warps=4, stages=3),
}
PLAIN = SELECTING | {
    ("16-bit", 8): Tile(128, 128, 64, warps=8, stages=3),
    ("16-bit", 9): Tile(128, 128, 64, warps=8, stages=4),
    ("16-bit", 10): Tile(128, 64, 64, warps=8, stages=4),
    ("16-bit", 12): Tile(128, 64, 64, warps=8, stages=2),
    ("tf32", 8): Tile(128, 64, 32, warps=8, stages=3),
}

BLOCK = 128  # rows of a program that adds up tiles
BLOCK_ROWS = 1024  # rows of a program that reads weights
ADDED = 16  # tiles that are added up at once


@reference_for_float64
def siglip_loss(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    target: Tensor | None,  # [N]
    query_mask: Tensor | None,  # [N]
    key_mask: Tensor | None,  # [M]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    weight: Tensor | None,  # [N]
    target_offset: int,
    ignore_index: int,
    same_id: int,
    normalize: bool,
    eps: float,
    per_row: bool,
    gradients: list[bool],
    allow_tf32: bool,
    workspace: int,
) -> tuple[Tensor, ...]:
    """The loss, the gradients that are asked for, inverse norms; all float32."""
    N, M = len(image_features), len(text_features)
    sizes = (N, M) if normalize else (0, 0)
    rnorms = [image_features.new_empty(size, dtype=torch.float32) for size in sizes]
    pairing = (target, query_mask, key_mask, query_ids, key_ids)
    options: Any = (target_offset, ignore_index, same_id, eps, allow_tf32, workspace)
    losses, *grads = _run(
        image_features, text_features, logit_scale, logit_bias, *pairing, weight, None,
        rnorms if normalize else None, False, True, (torch.float32,) * 4, gradients, *options,
    )  # fmt: skip
    return losses if per_row else losses.sum(), *grads, *rnorms


@reference_for_float64
def siglip_loss_backward(
    grad: Tensor,  # [N], or [] of the weighted sum
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    weight: Tensor | None,
    rnorm_q: Tensor,
    rnorm_k: Tensor,
    target_offset: int,
    ignore_index: int,
    same_id: int,
    normalize: bool,
    eps: float,
    allow_tf32: bool,
    workspace: int,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients, in the dtypes of the inputs."""
    inputs = (image_features, text_features, logit_scale, logit_bias)
    rnorms = [rnorm_q.contiguous(), rnorm_k.contiguous()] if normalize else None
    pairing = (target, query_mask, key_mask, query_ids, key_ids)
    options: Any = (target_offset, ignore_index, same_id, eps, allow_tf32, workspace)
    upstream = grad.expand(len(image_features)).contiguous()
    _, *grads = _run(
        *inputs, *pairing, weight, upstream, rnorms, True, False,
        tuple(t.dtype for t in inputs), output_mask, *options,
    )  # fmt: skip
    return tuple(grads)


def _run(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    weight: Tensor | None,  # [N]
    upstream: Tensor | None,  # [N], or 1
    rnorms: list[Tensor] | None,
    norms_are_known: bool,
    with_losses: bool,
    dtypes: tuple[torch.dtype, ...],  # of the gradients
    needed: list[bool],  # of image, text, scale, bias
    target_offset: int,
    ignore_index: int,
    same_id: int,
    eps: float,
    allow_tf32: bool,
    workspace: int,
) -> tuple[Tensor, ...]:
    """Losses of rows, [N], or empty, and the four gradients, empty if not needed."""
    inputs = (image_features, text_features, logit_scale, logit_bias)
    N, M, device = len(image_features), len(text_features), image_features.device
    need_image, need_text, need_scale, need_bias = needed
    target, query_ids, key_ids, weight = contiguous(target, query_ids, key_ids, weight)
    floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
    with on_device(image_features), precision_of_products(image_features, allow_tf32):
        rows = Rows(image_features, text_features, query_mask, key_mask, rnorms, eps)
        x, y = rows.prepare(None, known=norms_are_known)
        if N == 0 or M == 0:
            return _nothing(inputs, with_losses, dtypes, needed)
        state = torch.zeros(1, dtype=torch.int32, device=device)
        column, row = torch.empty(N, dtype=torch.int32, device=device), torch.empty(N, **floats)
        row_weights_kernel[(triton.cdiv(N, BLOCK_ROWS),)](
            upstream, weight, target, rows.query_mask, rows.key_mask, state, column, row,
            N, M, target_offset, ignore_index, BLOCK=BLOCK_ROWS,
        )  # fmt: skip

        diagonal = is_diagonal(target, query_mask, key_mask, same_id)
        table = PLAIN if diagonal and rnorms is None else SELECTING
        tile, over = launch(table, x, y, allow_tf32)
        column_tiles = triton.cdiv(M, tile.block_n)
        losses = torch.empty(N if with_losses else 0, **floats)
        biases = torch.empty(N, **floats) if need_bias else None
        shares = torch.empty(N, **floats) if need_scale else None

        def fill(first: int, length: int, out: Any, pitch: int) -> None:
            parts = [
                torch.empty(column_tiles, length, **floats) if wanted else None
                for wanted in (with_losses, need_bias, need_scale)
            ]
            siglip_kernel[over.grid(length, M)](
                over.x, over.y, out, logit_scale, logit_bias, state, column, row,
                rows.key_mask, query_ids, key_ids, *rows.rnorms, *parts,
                first, length, M, x.shape[1], pitch, target_offset, extra_of(x),
                SAME_ID=same_id, DIAGONAL=diagonal, **over.constants,
            )  # fmt: skip
            weigh_kernel[(triton.cdiv(length, BLOCK),)](
                *parts, row, losses, biases, shares, first, length, column_tiles,
                BLOCK=BLOCK, TILES=ADDED,
            )  # fmt: skip

        made: list[Tensor | None] = [None, None]
        if with_losses or any(needed):
            chunk = rows_of_chunk(tile, x, M, workspace)
            given = (dtypes[0] if need_image else None, dtypes[1] if need_text else None)
            made[:] = gradients_of_rows(
                fill, rows, x, y, chunk, over, Pairs(column), logit_scale, state, given
            )
        made += [None if sums is None else sums.sum() for sums in (shares, biases)]
    grads = zip(inputs, made, dtypes, strict=True)
    return losses, *(_shaped(t, grad, dtype) for t, grad, dtype in grads)


def _shaped(features: Tensor, grad: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient, of no feature where one stands for none; or empty if there is none."""
    if grad is None:
        return features.new_empty(0, dtype=dtype)
    if features.numel() == 0:
        return features.new_zeros(features.shape, dtype=dtype)
    return grad.to(dtype)


def _nothing(
    inputs: tuple[Tensor, ...],
    with_losses: bool,
    dtypes: tuple[torch.dtype, ...],
    needed: list[bool],
) -> tuple[Tensor, ...]:
    """What there is without any pair."""
    losses = inputs[0].new_zeros(len(inputs[0]) if with_losses else 0, dtype=torch.float32)
    grads = zip(inputs, dtypes, needed, strict=True)
    return losses, *(t.new_zeros(t.shape if n else 0, dtype=dtype) for t, dtype, n in grads)
