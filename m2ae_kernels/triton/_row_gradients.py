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


class Wanted(NamedTuple):
    """What to make: gradients of x and of y, in which dtype, and row dots."""

    x: torch.dtype | None
    y: torch.dtype | None
    dots: bool


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
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # [N, D], [M, D], [M]
    """Gradients of x and y as they were given; row dots, whose sum is the gradient of the scale."""
    (N, D), M, extra = x.shape, len(y), extra_of(x)
    # Row dots of y, always: gradients of the scale then do not depend on what else is wanted.
    by_columns = wanted.y is not None or wanted.dots
    one_block = rows.blocks["BLOCK_D"] >= D
    options = {"ONE_BLOCK": one_block, **rows.blocks}
    common = (pairs.weight, scale, state)
    numbers = (N, D, pairs.offset, rows.max_rnorm, extra)
    dots = torch.empty(M, dtype=torch.float32, device=x.device) if wanted.dots else None
    dx = None if wanted.x is None else torch.empty_like(x, dtype=wanted.x)
    dy = total = None
    matrix = x.new_empty((chunk, _pitch(M)))
    for first in range(0, N, chunk):
        length = min(chunk, N - first)
        part = matrix[:length, :M]
        fill(first, length, over.output(part), _pitch(M))
        if wanted.x is not None:
            row_gradients_kernel[(triton.cdiv(length, rows.blocks["ROWS"]),)](
                product(part, y), x, y, *rows.rnorms, rows.query_mask,
                pairs.column, None, None, *common, dx, None,
                first, length, *numbers, BY_COLUMN=False, **options,
            )  # fmt: skip
        if by_columns:
            total = add_product(total, part.mT, x[first : first + length])
    if total is not None:
        del matrix, part  # to make room
        if wanted.y is not None:
            in_place = one_block and wanted.y == total.dtype  # a program reads a row, then writes
            dy = total if in_place else torch.empty_like(y, dtype=wanted.y)
        row_gradients_kernel[(triton.cdiv(M, rows.blocks["ROWS"]),)](
            total, y, x, *rows.rnorms[::-1], rows.key_mask,
            pairs.column, pairs.starts, pairs.order, *common,
            dy, dots, 0, M, *numbers, BY_COLUMN=True, **options,
        )  # fmt: skip
    return dx, dy, dots


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
    grad_ptr,  # out, [., D], or None
    dots_ptr,  # out, float32 [.], the row's share in the gradient of the scale; or None
    first,  # row of this chunk
    rows,  # in this chunk
    N,
    D,
    offset,
    max_rnorm,  # 1 / eps
    extra,  # what the gradients of logits were multiplied with
    BY_COLUMN: tl.constexpr,  # this side is the keys
    ONE_BLOCK: tl.constexpr,  # D <= BLOCK_D
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

    dot = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    x = total
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        ok = present[:, None] & (d < D)[None, :]
        total = _gradient_by(
            d, ok, local, row, sums_ptr, unscale, other_ptr, other_rnorm_ptr, order_ptr,
            weight_ptr, begin, end, D, BY_COLUMN, INTERPRETED,
        )  # fmt: skip
        at = row.to(tl.int64)[:, None] * D + d[None, :]
        x = float32_of(tl.load(own_ptr + at, mask=ok, other=0.0), INTERPRETED) * own_factor[:, None]
        dot += tl.sum(total * x, axis=1)
    if dots_ptr is not None:
        tl.store(dots_ptr + row, dot, mask=in_chunk)
    if grad_ptr is not None:
        # A norm below eps is no function of the row.
        along = tl.where(rnorm < max_rnorm, scale * dot, 0.0)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            at = row.to(tl.int64)[:, None] * D + d[None, :]
            if not ONE_BLOCK:
                ok = present[:, None] & (d < D)[None, :]
                total = _gradient_by(
                    d, ok, local, row, sums_ptr, unscale, other_ptr, other_rnorm_ptr, order_ptr,
                    weight_ptr, begin, end, D, BY_COLUMN, INTERPRETED,
                )  # fmt: skip
                x = float32_of(tl.load(own_ptr + at, mask=ok, other=0.0), INTERPRETED)
                x = x * own_factor[:, None]
            grad = scale * total
            if own_rnorm_ptr is not None:
                grad = (grad - x * along[:, None]) * rnorm[:, None]
            grad = tl.where(present[:, None], grad, 0.0)
            grad = rounded_to(grad, grad_ptr.dtype.element_ty, INTERPRETED)
            tl.store(grad_ptr + at, grad, mask=in_chunk[:, None] & (d < D)[None, :])
