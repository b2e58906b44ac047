"""info_nce_loss in Triton and cuBLAS. Contract and math: m2ae_kernels/ops/info_nce_loss.py

Forward, one product: rows as they enter it (_rows.py), statistics of tiles
(_info_nce_loss_statistics.py), their sums (_info_nce_loss_sums.py). Backward, three: gradients of
the logits of a chunk of rows (_info_nce_loss_gradients.py), times y, and transposed times x, by
cuBLAS; then gradients of rows (_row_gradients.py). Nothing waits for the device, so that all of it
can be captured in a CUDA graph; the same inputs give the same bits.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from m2ae_kernels.triton import _info_nce_loss_gradients as gradients
from m2ae_kernels.triton import _info_nce_loss_sides as sides
from m2ae_kernels.triton import _info_nce_loss_statistics as statistics
from m2ae_kernels.triton import _info_nce_loss_sums as sums
from m2ae_kernels.triton._device import on_device
from m2ae_kernels.triton._float64 import reference_for_float64
from m2ae_kernels.triton._products import precision_of_products
from m2ae_kernels.triton._row_gradients import (
    Pairs,
    extra_of,
    gradients_of_rows,
    rows_of_chunk,
)
from m2ae_kernels.triton._rows import Rows, contiguous, queries_by_column, similarity_kernel
from m2ae_kernels.triton._tiles import Tile, is_diagonal, launch

# Tiles by kind of product and major compute capability, 0 being the interpreter; rows of an odd
# kind are no multiples of 16 bytes. None of them has been timed on a GPU: registers and shared
# memory chose them (tests/test_triton.py shows both). The first two are for the plain loss of
# normalized features, those SELECTING for any mask, target, ids or normalization, and COUNTING for
# ranks or several positives, which take the most registers. In STATISTICS tall tiles, because a sum
# over columns costs shuffles for every column of a tile.
INTERPRETED = Tile(32, 64, 32, warps=4, stages=1, group=2)
STATISTICS_SELECTING = {
    ("16-bit", 0): INTERPRETED,
    ("16-bit", 8): Tile(128, 128, 64, warps=8, stages=3),
    ("16-bit", 9): Tile(128, 128, 64, warps=8, stages=4, flatten=False),
    ("16-bit", 10): Tile(128, 64, 64, warps=8, stages=4),
    ("16-bit", 12): Tile(128, 128, 64, warps=8, stages=2),
    ("odd 16-bit", 0): INTERPRETED,
    ("odd 16-bit", 8): Tile(64, 32, 32, warps=8, stages=2),
    ("tf32", 0): INTERPRETED,
    ("tf32", 8): Tile(128, 128, 32, warps=8, stages=3),
    ("float32", 0): INTERPRETED,
    ("float32", 8): Tile(32, 64, 32, warps=4, stages=3),
    ("float32", 10): Tile(32, 32, 32, warps=4, stages=3),
}
STATISTICS = STATISTICS_SELECTING | {
    ("16-bit", 9): Tile(256, 128, 64, warps=8, stages=3),
    ("16-bit", 10): Tile(128, 128, 64, warps=8, stages=4, flatten=False),
}
GRADIENTS_SELECTING = STATISTICS_SELECTING | {
    ("16-bit", 8): Tile(64, 128, 64, warps=8, stages=3),
    ("16-bit", 9): Tile(128, 128, 64, warps=8, stages=4),
    ("16-bit", 12): Tile(64, 128, 64, warps=8, stages=2),
    ("16-bit", 10): Tile(128, 128, 64, warps=8, stages=3, flatten=False),
}
GRADIENTS = STATISTICS_SELECTING | {
    ("16-bit", 9): Tile(128, 128, 64, warps=8, stages=4),
    ("16-bit", 10): Tile(128, 128, 64, warps=8, stages=4, flatten=False),
}
COUNTING = STATISTICS_SELECTING | {
    ("16-bit", 8): Tile(64, 128, 64, warps=8, stages=3),
    ("16-bit", 9): Tile(64, 64, 64, warps=8, stages=3),
    ("16-bit", 10): Tile(64, 32, 64, warps=8, stages=2),
    ("16-bit", 12): Tile(64, 128, 64, warps=8, stages=2),
    ("tf32", 8): Tile(64, 32, 32, warps=8, stages=2),
}

PARTS = 128 << 20  # bytes of sums over tiles in forward, within the workspace
BLOCK = 128  # rows or columns of a program that adds up tiles
BLOCK_SIDES = 256  # rows or columns of a program that reads statistics
TILES = 16  # that are added up at once
BLOCK_J, BLOCK_Q = 8, 64  # columns of a program, and queries of each that are added up at once


def _rows_of_parts(
    tile: Tile, N: int, column_tiles: int, M: int, planes: int, workspace: int
) -> int:
    """Rows of a chunk whose sums over tiles take no more memory than they may, but one tile."""
    of_row_tile = 4 * planes * (tile.block_m * column_tiles + M)
    row_tiles = max(min(workspace, PARTS) // max(of_row_tile, 1), 1)
    if row_tiles > TILES:  # so that the order of the additions does not depend on the chunks
        row_tiles = row_tiles // TILES * TILES
    return min(row_tiles, max(triton.cdiv(N, tile.block_m), 1)) * tile.block_m


@reference_for_float64
def info_nce_loss(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    target: Tensor | None,  # [N]
    query_mask: Tensor | None,  # [N]
    key_mask: Tensor | None,  # [M]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    target_offset: int,
    ignore_index: int,
    same_id: int,
    exclude_self: bool,
    normalize: bool,
    eps: float,
    symmetric: bool,
    ranks: bool,
    keep: bool,
    allow_tf32: bool,
    workspace: int,
) -> tuple[Tensor, ...]:
    """Losses and statistics per row, in the order of the schema."""
    N, M = len(query), len(key)
    of_keys = M if symmetric else 0
    numbers = [query.new_empty(size, dtype=torch.float32) for size in (N, of_keys) * 4]
    sizes = (N, M) if normalize else (0, 0)
    rnorms = [query.new_empty(size, dtype=torch.float32) for size in sizes]
    sizes = (N, of_keys) if ranks else (0, 0)
    counts = [query.new_empty(size, dtype=torch.int64) for size in sizes]
    kept = query.new_zeros((N, M) if keep else 0, dtype=torch.float32)  # of no use here

    target, query_ids, key_ids = contiguous(target, query_ids, key_ids)
    with on_device(query):
        state = torch.zeros(3, dtype=torch.int32, device=query.device)
        rows = Rows(query, key, query_mask, key_mask, rnorms if normalize else None, eps)
        x, y = rows.prepare(None if normalize else state, known=False)
        pairing = (target, rows.query_mask, rows.key_mask)
        column = torch.empty(N, dtype=torch.int32, device=query.device)
        similarity = torch.empty(N, dtype=torch.float32, device=query.device)
        similarity_kernel[(triton.cdiv(N, rows.blocks["ROWS"]),)](
            x, y, *rows.rnorms, *pairing, column, similarity, N, M, x.shape[1],
            target_offset, ignore_index, EXCLUDE_SELF=exclude_self, **rows.blocks,
        )  # fmt: skip
        targets = None
        if symmetric:
            targets = torch.empty(4, M, dtype=torch.float32, device=query.device)
            starts, order = queries_by_column(column, target, M)
            block_j, block_q = (BLOCK, 1) if target is None else (BLOCK_J, BLOCK_Q)
            sums.targets_of_columns_kernel[(triton.cdiv(M, block_j),)](
                similarity, column, starts, order, logit_scale, targets, N, M, target_offset,
                BLOCK_J=block_j, BLOCK_Q=block_q,
            )  # fmt: skip
        diagonal = is_diagonal(target, query_mask, key_mask, same_id) and not ranks
        table = STATISTICS if diagonal and not normalize else STATISTICS_SELECTING
        table = COUNTING if ranks or same_id == 2 else table
        tile, over = launch(table, x, y, allow_tf32)

        planes = 7 if same_id == 2 else 3 if ranks else 2
        column_tiles = triton.cdiv(M, tile.block_n)
        chunk = _rows_of_parts(tile, N, column_tiles, of_keys, planes, workspace)
        row_tiles = triton.cdiv(chunk, tile.block_m)
        row_parts = query.new_empty((planes, column_tiles, chunk), dtype=torch.float32)
        column_parts = carried = None
        if symmetric:
            column_parts = query.new_empty((planes, row_tiles, M), dtype=torch.float32)
            carried = query.new_empty((planes, M), dtype=torch.float32)
        for first in range(0, max(N, 1), chunk):
            length = min(chunk, N - first)
            row_tiles = triton.cdiv(length, tile.block_m)
            blocks = (triton.cdiv(length, BLOCK) + triton.cdiv(of_keys, BLOCK),)
            shape = (first, length, M, row_tiles, column_tiles)
            for robust in (False, True):
                statistics.statistics_kernel[over.grid(length, M)](
                    over.x, over.y, logit_scale, state, column, rows.key_mask, query_ids, key_ids,
                    *rows.rnorms, similarity if ranks else None,
                    targets if ranks else None, row_parts, column_parts,
                    first, length, M, x.shape[1], target_offset,
                    SAME_ID=same_id, EXCLUDE_SELF=exclude_self, DIAGONAL=diagonal, ROBUST=robust,
                    **over.constants,
                )  # fmt: skip
                if not robust:
                    sums.check_kernel[blocks](
                        row_parts, column_parts, state, column, rows.key_mask, *shape,
                        SAME_ID=same_id, BLOCK=BLOCK, TILES=TILES,
                    )  # fmt: skip
            of_rows, of_columns = numbers[0::2], numbers[1::2] if symmetric else [None] * 4
            sums.fold_kernel[blocks](
                row_parts, column_parts, carried, state, logit_scale, column, similarity,
                targets, target, *of_rows, *of_columns, counts[0] if ranks else None,
                counts[1] if ranks and symmetric else None,
                first, length, N, *shape[2:], ignore_index,
                NORMALIZE=normalize, SAME_ID=same_id, BLOCK=BLOCK, TILES=TILES,
            )  # fmt: skip
    return *numbers, *rnorms, *counts, kept


@reference_for_float64
def info_nce_loss_backward(
    grad_q: Tensor,  # [N]
    grad_k: Tensor,  # [M], empty if the loss is not symmetric
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    neg_q: Tensor,
    neg_k: Tensor,
    pos_q: Tensor,
    pos_k: Tensor,
    num_q: Tensor,
    num_k: Tensor,
    rnorm_q: Tensor,
    rnorm_k: Tensor,
    kept: Tensor,
    target_offset: int,
    ignore_index: int,
    same_id: int,
    exclude_self: bool,
    normalize: bool,
    eps: float,
    symmetric: bool,
    allow_tf32: bool,
    workspace: int,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients of query, key and logit_scale."""
    N, M = len(query), len(key)
    need_query, need_key, need_scale = output_mask
    if 0 in (N, M, query.shape[1]) or not any(output_mask):
        inputs = zip((query, key, logit_scale), output_mask, strict=True)
        return tuple(t.new_zeros(t.shape if need else 0) for t, need in inputs)
    target, query_ids, key_ids = contiguous(target, query_ids, key_ids)
    with on_device(query), precision_of_products(query, allow_tf32):
        rnorms = [rnorm_q.contiguous(), rnorm_k.contiguous()] if normalize else None
        rows = Rows(query, key, query_mask, key_mask, rnorms, eps)
        x, y = rows.prepare(None, known=True)
        several = same_id == 2
        floats: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
        state = torch.full((3,), -(2**31), dtype=torch.int32, device=query.device)
        column = torch.empty(N, dtype=torch.int32, device=query.device)
        dpos = None if several else torch.empty(N, **floats)
        planes = 5 if several else 2
        of_rows, of_columns = torch.empty(planes, N, **floats), None
        given_q = contiguous(grad_q, neg_q, pos_q, num_q)
        given_k: tuple[Tensor | None, ...] = (None,) * 4
        blocks = triton.cdiv(N, BLOCK_SIDES)
        if symmetric:
            of_columns = torch.empty(planes, M, **floats)
            given_k = contiguous(grad_k, neg_k, pos_k, num_k)
            blocks += triton.cdiv(M, BLOCK_SIDES)
        pairing = (target, rows.query_mask, rows.key_mask)
        sides.sides_kernel[(blocks,)](
            *given_q, *given_k, *pairing, state, column, dpos, of_rows, of_columns,
            N, M, target_offset, ignore_index,
            SAME_ID=same_id, EXCLUDE_SELF=exclude_self, BLOCK=BLOCK_SIDES,
        )  # fmt: skip
        similarity = shares = None
        if need_scale:
            shares = torch.empty(N, **floats)
            if not several:
                similarity = torch.empty(N, **floats)
                similarity_kernel[(triton.cdiv(N, rows.blocks["ROWS"]),)](
                    x, y, *rows.rnorms, *pairing, column, similarity, N, M, x.shape[1],
                    target_offset, ignore_index, EXCLUDE_SELF=exclude_self, **rows.blocks,
                )  # fmt: skip

        diagonal = is_diagonal(target, query_mask, key_mask, same_id)
        table = GRADIENTS if diagonal and not normalize else GRADIENTS_SELECTING
        tile, over = launch(COUNTING if several else table, x, y, allow_tf32)
        column_tiles = triton.cdiv(M, tile.block_n)

        def fill(first: int, length: int, out: Any, pitch: int) -> None:
            parts = None if shares is None else torch.empty(column_tiles, length, **floats)
            gradients.gradient_kernel[over.grid(length, M)](
                over.x, over.y, out, logit_scale, state, column, rows.key_mask,
                query_ids, key_ids, *rows.rnorms, of_rows, of_columns, parts,
                first, length, N, M, x.shape[1], pitch, target_offset, extra_of(x),
                SAME_ID=same_id, EXCLUDE_SELF=exclude_self, DIAGONAL=diagonal, **over.constants,
            )  # fmt: skip
            if shares is not None:
                sides.shares_kernel[(triton.cdiv(length, BLOCK),)](
                    parts, dpos, similarity, state, shares, first, length, column_tiles,
                    extra_of(x), BLOCK=BLOCK, TILES=TILES,
                )  # fmt: skip

        by_target = target if need_key and not several else None
        pairs = Pairs(column, *queries_by_column(column, by_target, M), target_offset, dpos)
        dtypes = (query.dtype if need_query else None, key.dtype if need_key else None)
        chunk = rows_of_chunk(tile, x, M, workspace)
        dquery, dkey = gradients_of_rows(
            fill, rows, x, y, chunk, over, pairs, logit_scale, state, dtypes
        )
        dscale = None if shares is None else shares.sum().to(logit_scale.dtype)
    return (
        query.new_empty(0) if dquery is None else dquery,
        key.new_empty(0) if dkey is None else dkey,
        logit_scale.new_empty(0) if dscale is None else dscale,
    )
