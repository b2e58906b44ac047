"""From gradients of logits, a chunk of rows at a time, to gradients of rows; contrastive losses.

The chunk, [rows, M] in the dtype of the features, is multiplied with y, and its transpose with x,
by cuBLAS in float32. What a kernel divides out of it or adds to it afterwards is float32, too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2ae_kernels.triton._numbers import float32_of, mantissa, rounded_to
from m2ae_kernels.triton._products import add_product, product
from m2ae_kernels.triton._rows import Rows, queries_of_columns
from m2ae_kernels.triton._tiles import Launch, Tile

ROWS = 4096  # of a chunk: 4096 x 65536 gradients in 16 bits are the default workspace
ENTRIES = 1 << 26  # of a chunk; more rows than ROWS if they are short
FLOAT16_EXTRA = 4096.0  # lifts small gradients of logits into float16's range; 8 times it fits


class Pairs(NamedTuple):
    """Which rows of the other side are added to a row, and how much of them."""

    column: Tensor  # int32 [N], each query's target
    starts: Tensor | None = None  # int64 [M + 1], a column's queries in `order`
    order: Tensor | None = None  # int64 [N]; None: a column's query is j - offset
    offset: int = 0
    weight: Tensor | None = None  # float32 [N]; None: none is added


def rows_of_chunk(tile: Tile, x: Tensor, M: int, workspace: int) -> int:
    """How many rows a chunk has: what the workspace holds, but a tile's at least."""
    N, D = x.shape
    rows = min(max(ROWS, ENTRIES // max(M, 2 * D)), workspace // (_pitch(M) * x.element_size()))
    return max(min(rows, N) // tile.block_m * tile.block_m, tile.block_m)


def extra_of(x: Tensor) -> float:
    """What gradients of logits are multiplied with."""
    return FLOAT16_EXTRA if x.dtype == torch.float16 else 1.0


def _pitch(M: int) -> int:
    return triton.cdiv(M, 16) * 16  # so that rows of a chunk are aligned, as products like them


def gradients_of_rows(
    fill: Callable[[int, int, Any, int], None],  # (first, rows, where to, pitch): make a chunk
    rows: Rows,
    x: Tensor,  # [N, D], as it enters the products
    y: Tensor,  # [M, D]
    chunk: int,
    over: Launch,
    pairs: Pairs,
    scale: Tensor,  # []
    state: Tensor,  # int32, bits of the float32 that the gradients of logits were divided by
    dtypes: tuple[torch.dtype | None, torch.dtype | None],  # of the gradients; None: not needed
) -> tuple[Tensor | None, Tensor | None]:  # [N, D], [M, D]
    """Gradients of x and y as they were given."""
    (N, D), M, extra = x.shape, len(y), extra_of(x)
    dtype_x, dtype_y = dtypes
    common = (pairs.weight, scale, state)
    numbers = (N, D, pairs.offset, rows.max_rnorm, extra)
    dx = None if dtype_x is None else torch.empty_like(x, dtype=dtype_x)
    dy = total = None
    matrix = None if dtype_x is None and dtype_y is None else x.new_empty((chunk, _pitch(M)))
    for first in range(0, N, chunk):
        length = min(chunk, N - first)
        if matrix is None:
            fill(first, length, None, _pitch(M))
            continue
        part = matrix[:length, :M]
        fill(first, length, over.output(part), _pitch(M))
        if dtype_x is not None:
            row_gradients_kernel[(triton.cdiv(length, rows.blocks["ROWS"]),)](
                product(part, y), x, y, *rows.rnorms, rows.query_mask,
                pairs.column, None, None, *common, dx,
                first, length, *numbers, BY_COLUMN=False, **rows.blocks,
            )  # fmt: skip
        if dtype_y is not None:
            total = add_product(total, part.mT, x[first : first + length])
    if total is not None:
        del matrix, part  # to make room
        # In place if it can be: a program reads a block of its rows before it writes that block.
        dy = total if dtype_y == total.dtype else torch.empty_like(y, dtype=dtype_y)
        row_gradients_kernel[(triton.cdiv(M, rows.blocks["ROWS"]),)](
            total, y, x, *rows.rnorms[::-1], rows.key_mask,
            pairs.column, pairs.starts, pairs.order, *common, dy,
            0, M, *numbers, BY_COLUMN=True, **rows.blocks,
        )  # fmt: skip
    return dx, dy


@triton.jit
def _gradient_by(
    d,  # [BLOCK_D], features
    ok,  # [ROWS, BLOCK_D]
    local,  # [ROWS], rows of the sums
    row,  # [ROWS], the same rows of this side
    sums_ptr,
    unscale,  # [ROWS]
    other_ptr,
    other_rnorm_ptr,
    order_ptr,
    weight_ptr,
    begin,  # [ROWS]
    end,
    D,
    BY_COLUMN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """By features d of the normalized rows, before the scale of the logits: [ROWS, BLOCK_D]."""
    at = local.to(tl.int64)[:, None] * D + d[None, :]
    total = tl.load(sums_ptr + at, mask=ok, other=0.0) * unscale[:, None]
    if weight_ptr is not None:
        for step in range(tl.max(end - begin, axis=0)):
            partner = begin + step
            has_partner = partner < end
            if order_ptr is not None:
                partner = tl.load(order_ptr + partner, mask=has_partner, other=0)
            if BY_COLUMN:
                weight = tl.load(weight_ptr + partner, mask=has_partner, other=0.0)
            else:
                weight = tl.load(weight_ptr + row, mask=has_partner, other=0.0)
            if other_rnorm_ptr is not None:
                rnorm = tl.load(other_rnorm_ptr + partner, mask=has_partner, other=1.0)
                weight = weight * mantissa(rnorm)
            other = other_ptr + partner.to(tl.int64)[:, None] * D + d[None, :]
            other = tl.load(other, mask=ok & has_partner[:, None], other=0.0)
            total += weight[:, None] * float32_of(other, INTERPRETED)
    return total


@triton.jit(do_not_specialize=["first", "rows", "N", "offset"])
def row_gradients_kernel(
    sums_ptr,  # float32 [rows, D]: gradients of logits, multiplied with the other side's rows
    own_ptr,  # [., D], rows of this side as they entered the products
    other_ptr,  # [., D], rows of the other side
    own_rnorm_ptr,  # float32 [.] or None
    other_rnorm_ptr,  # float32 [.] or None
    mask_ptr,  # int8 [.] or None, of this side
    column_ptr,  # int32 [N], each query's target
    starts_ptr,  # int64 [M + 1], a column's queries in `order`; None: the target is i + offset
    order_ptr,  # int64 [N]; None: the positions are the queries
    weight_ptr,  # float32 [N], by which each query and its target are added; None: not at all
    scale_ptr,  # []
    largest_ptr,  # float32 [], by its bits: what the gradients of logits were divided by
    grad_ptr,  # out, [., D]
    first,  # row of this chunk
    rows,  # in this chunk
    N,
    D,
    offset,
    max_rnorm,  # 1 / eps
    extra,  # what the gradients of logits were multiplied with
    BY_COLUMN: tl.constexpr,  # this side is the keys
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns ROWS rows.
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_chunk = local < rows
    row = first + local
    present = in_chunk
    if mask_ptr is not None:
        present = tl.load(mask_ptr + row, mask=in_chunk, other=0) != 0
    scale = tl.load(scale_ptr).to(tl.float32)
    unscale = tl.load(largest_ptr).to(tl.float32, bitcast=True) / extra
    own_factor = tl.full([ROWS], 1.0, tl.float32)
    rnorm = own_factor
    if own_rnorm_ptr is not None:
        rnorm = tl.load(own_rnorm_ptr + row, mask=in_chunk, other=1.0)
        own_factor = mantissa(rnorm)
    unscale = unscale / own_factor
    begin = tl.zeros([ROWS], tl.int64)
    end = begin
    if weight_ptr is not None:
        if BY_COLUMN:
            begin, end = queries_of_columns(row, present, column_ptr, starts_ptr, N, offset)
        else:
            begin = tl.load(column_ptr + row, mask=present, other=-1).to(tl.int64)
            end = tl.where(begin < 0, begin, begin + 1)

    along = tl.zeros([ROWS], tl.float32)
    if own_rnorm_ptr is not None:
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            ok = present[:, None] & (d < D)[None, :]
            total = _gradient_by(
                d, ok, local, row, sums_ptr, unscale, other_ptr, other_rnorm_ptr, order_ptr,
                weight_ptr, begin, end, D, BY_COLUMN, INTERPRETED,
            )  # fmt: skip
            x = tl.load(own_ptr + row.to(tl.int64)[:, None] * D + d[None, :], mask=ok, other=0.0)
            along += tl.sum(total * (float32_of(x, INTERPRETED) * own_factor[:, None]), axis=1)
        # A norm below eps is no function of the row.
        along = tl.where(rnorm < max_rnorm, along, 0.0)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        ok = present[:, None] & (d < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + d[None, :]
        grad = _gradient_by(
            d, ok, local, row, sums_ptr, unscale, other_ptr, other_rnorm_ptr, order_ptr,
            weight_ptr, begin, end, D, BY_COLUMN, INTERPRETED,
        )  # fmt: skip
        if own_rnorm_ptr is not None:
            x = float32_of(tl.load(own_ptr + at, mask=ok, other=0.0), INTERPRETED)
            grad = (grad - x * own_factor[:, None] * along[:, None]) * rnorm[:, None]
        grad = tl.where(present[:, None], scale * grad, 0.0)
        grad = rounded_to(grad, grad_ptr.dtype.element_ty, INTERPRETED)
        tl.store(grad_ptr + at, grad, mask=in_chunk[:, None] & (d < D)[None, :])
