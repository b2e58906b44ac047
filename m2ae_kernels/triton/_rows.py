"""Rows of the contrastive losses in Triton as they enter the products, and the pairs they form.

The products read rows as they are given where that is right. With a mask or to be normalized they
read copies: absent rows are 0 there, so that a NaN in them reaches nothing, and rows are multiplied
by the power of two in 1 / |row|. That is exact, keeps products of rows of norm 1e20 or 1e-20 within
range, and leaves a factor in [1, 2) to the kernels, the mantissa of 1 / |row|.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2ae_kernels.triton._device import is_interpreted
from m2ae_kernels.triton._numbers import float32_of, mantissa, power_of_two, rounded_to

BLOCK_D = 2048  # features that a program steps by, at most
NUMBERS = 512  # that a program holds of its rows at once, if they are short; more spilled
ROWS = 8  # that a program owns, at most
INTERPRETED = {"BLOCK_D": 32, "NUMBERS": 1024, "ROWS": 32}  # fewer programs, several steps


class Rows:
    """Queries and keys as the kernels take them."""

    def __init__(
        self,
        query: Tensor,  # [N, D]
        key: Tensor,  # [M, D]
        query_mask: Tensor | None,  # bool [N]
        key_mask: Tensor | None,  # bool [M]
        rnorms: list[Tensor] | None,  # float32 [N] and [M], if the rows are to be normalized
        eps: float,
    ) -> None:
        if query.shape[1] == 0:  # one feature that is 0, and no kernel has to know
            query, key = query.new_zeros(len(query), 1), key.new_zeros(len(key), 1)
        self.query, self.key = query.contiguous(), key.contiguous()
        self.query_mask, self.key_mask = (
            None if mask is None else mask.contiguous().view(torch.int8)
            for mask in (query_mask, key_mask)
        )
        self.rnorms = [None, None] if rnorms is None else rnorms
        self.max_rnorm = 1 / eps
        self.blocks = _blocks(query.shape[1], is_interpreted(query))

    def prepare(self, bounds: Tensor | None, known: bool) -> tuple[Tensor, Tensor]:
        """The rows as they enter the products. Inverse norms are an output, unless they are known;
        the largest squared norms, by their bits, are one into `bounds`, int32 [2], if given.
        """
        x, y = self.query, self.key
        normalized = self.rnorms[0] is not None
        copied = normalized or self.query_mask is not None or self.key_mask is not None
        if copied:
            x, y = torch.empty_like(x), torch.empty_like(y)
        if copied or bounds is not None:
            (N, D), M, rows = x.shape, len(y), self.blocks["ROWS"]
            prepare_kernel[(triton.cdiv(N, rows) + triton.cdiv(M, rows),)](
                self.query, self.key, self.query_mask, self.key_mask, *self.rnorms,
                x if copied else None, y if copied else None, bounds, N, M, D, self.max_rnorm,
                KNOWN=known, **self.blocks,
            )  # fmt: skip
        return x, y


def _blocks(D: int, interpreted: bool) -> dict[str, Any]:
    """How many rows a program owns, and how it steps through their features."""
    most = INTERPRETED if interpreted else {"BLOCK_D": BLOCK_D, "NUMBERS": NUMBERS, "ROWS": ROWS}
    block = min(max(triton.next_power_of_2(D), 16), most["BLOCK_D"])
    return {
        "INTERPRETED": interpreted,
        "ROWS": min(max(most["NUMBERS"] // block, 1), most["ROWS"]),
        "BLOCK_D": block,
        "num_warps": 4,
    }


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each, if given, in the order in which kernels read it."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def queries_by_column(
    column: Tensor, target: Tensor | None, M: int
) -> tuple[Tensor | None, Tensor | None]:
    """Where each column's queries start, [M + 1], in the order, [N], that is returned with it.

    Without a target a column has at most one, which needs no search.
    """
    if target is None:
        return None, None
    columns, order = torch.sort(column, stable=True)
    bounds = torch.arange(M + 1, dtype=columns.dtype, device=columns.device)
    return torch.searchsorted(columns, bounds), order


@triton.jit
def _prepare_rows(
    row,  # [ROWS]
    in_range,
    x_ptr,  # [N, D]
    mask_ptr,  # int8 [N] or None
    rnorm_ptr,  # float32 [N] or None
    copy_ptr,  # [N, D] or None
    longest_ptr,  # int32 []: bits of the largest |x|**2, or None
    D,
    max_rnorm,  # 1 / eps
    KNOWN: tl.constexpr,  # rnorm is an input
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    present = in_range
    if mask_ptr is not None:
        present = tl.load(mask_ptr + row, mask=in_range, other=0) != 0
    factor = tl.full([ROWS], 1.0, tl.float32)
    first = row.to(tl.int64)[:, None] * D
    if rnorm_ptr is not None:
        if KNOWN:
            rnorm = tl.load(rnorm_ptr + row, mask=in_range, other=1.0)
        else:
            # The squares of float32 rows of norm 1e20 are no float32.
            squares = tl.zeros([ROWS], tl.float64)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                ok = present[:, None] & (d < D)[None, :]
                x = tl.load(x_ptr + first + d[None, :], mask=ok, other=0.0)
                x = float32_of(x, INTERPRETED).to(tl.float64)
                squares += tl.sum(x * x, axis=1)
            rnorm = (1.0 / tl.sqrt(squares)).to(tl.float32)
            rnorm = tl.where(rnorm > max_rnorm, max_rnorm, rnorm)  # NaN stays
            tl.store(rnorm_ptr + row, rnorm, mask=in_range)
        factor = power_of_two(rnorm)
    if longest_ptr is not None:
        lengths = tl.zeros([ROWS], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            ok = present[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + first + d[None, :], mask=ok, other=0.0)
            x = float32_of(x, INTERPRETED)
            lengths += tl.sum(x * x, axis=1)
        # Bits of numbers >= 0 are in their order. NaN bounds nothing: it shows in the sums.
        longest = tl.max(tl.where(lengths == lengths, lengths, 0.0), axis=0)
        tl.atomic_max(longest_ptr, longest.to(tl.int32, bitcast=True), sem="relaxed")
    if copy_ptr is not None:
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            ok = present[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + first + d[None, :], mask=ok, other=0.0)
            x = float32_of(x, INTERPRETED)
            x = rounded_to(x * factor[:, None], copy_ptr.dtype.element_ty, INTERPRETED)
            ok = in_range[:, None] & (d < D)[None, :]
            tl.store(copy_ptr + first + d[None, :], x, mask=ok)


@triton.jit(do_not_specialize=["N", "M"])
def prepare_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    query_mask_ptr,  # int8 [N] or None
    key_mask_ptr,  # int8 [M] or None
    rnorm_q_ptr,  # float32 [N] or None
    rnorm_k_ptr,  # float32 [M] or None
    x_copy_ptr,  # [N, D] or None
    y_copy_ptr,  # [M, D] or None
    bounds_ptr,  # out, int32 [2]: bits of the largest |x|**2 and |y|**2; or None
    N,
    M,
    D,
    max_rnorm,
    KNOWN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns ROWS rows, of x or of y.
    block = tl.program_id(0)
    blocks_of_x = tl.cdiv(N, ROWS)
    if block < blocks_of_x:
        row = block * ROWS + tl.arange(0, ROWS)
        _prepare_rows(
            row, row < N, x_ptr, query_mask_ptr, rnorm_q_ptr, x_copy_ptr, bounds_ptr,
            D, max_rnorm, KNOWN, INTERPRETED, ROWS, BLOCK_D,
        )  # fmt: skip
    else:
        row = (block - blocks_of_x) * ROWS + tl.arange(0, ROWS)
        longest_ptr = bounds_ptr
        if longest_ptr is not None:
            longest_ptr += 1
        _prepare_rows(
            row, row < M, y_ptr, key_mask_ptr, rnorm_k_ptr, y_copy_ptr, longest_ptr,
            D, max_rnorm, KNOWN, INTERPRETED, ROWS, BLOCK_D,
        )  # fmt: skip


@triton.jit
def target_column(
    i,  # rows
    in_range,
    target_ptr,  # int64 [N] or None
    query_mask_ptr,  # int8 [N] or None
    key_mask_ptr,  # int8 [M] or None
    M,
    offset,
    ignore_index,
    EXCLUDE_SELF: tl.constexpr,
):
    """Each row's target if that is a pair that is not absent, else -1; -2 if the row is absent."""
    itself = i.to(tl.int64) + offset
    column = itself
    paired = in_range
    if target_ptr is not None:
        column = tl.load(target_ptr + i, mask=in_range, other=-1)
        paired = paired & (column != ignore_index)
    paired = paired & (column >= 0) & (column < M)
    if key_mask_ptr is not None:
        paired = paired & (tl.load(key_mask_ptr + column, mask=paired, other=0) != 0)
    if EXCLUDE_SELF:
        paired = paired & (column != itself)
    column = tl.where(paired, column, -1).to(tl.int32)
    if query_mask_ptr is not None:
        present = tl.load(query_mask_ptr + i, mask=in_range, other=0) != 0
        column = tl.where(present, column, -2)
    return column


@triton.jit(do_not_specialize=["N", "M", "offset", "ignore_index"])
def similarity_kernel(
    x_ptr,  # [N, D], as it enters the products
    y_ptr,  # [M, D], the same
    rnorm_q_ptr,  # float32 [N] or None
    rnorm_k_ptr,  # float32 [M] or None
    target_ptr,  # int64 [N] or None
    query_mask_ptr,  # int8 [N] or None
    key_mask_ptr,  # int8 [M] or None
    column_ptr,  # out, int32 [N]
    similarity_ptr,  # out, float32 [N]: of the row and its target, 0 without one
    N,
    M,
    D,
    offset,
    ignore_index,
    EXCLUDE_SELF: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program owns ROWS rows of x, and reads the rows of y that are their targets.
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_range = i < N
    column = target_column(
        i, in_range, target_ptr, query_mask_ptr, key_mask_ptr, M, offset, ignore_index, EXCLUDE_SELF
    )
    tl.store(column_ptr + i, column, mask=in_range)
    paired = in_range & (column >= 0)
    similarity = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        ok = paired[:, None] & (d < D)[None, :]
        at_x = i.to(tl.int64)[:, None] * D + d[None, :]
        at_y = column.to(tl.int64)[:, None] * D + d[None, :]
        x = float32_of(tl.load(x_ptr + at_x, mask=ok, other=0.0), INTERPRETED)
        y = float32_of(tl.load(y_ptr + at_y, mask=ok, other=0.0), INTERPRETED)
        similarity += tl.sum(x * y, axis=1)
    if rnorm_q_ptr is not None:
        similarity *= mantissa(tl.load(rnorm_q_ptr + i, mask=paired, other=1.0))
        similarity *= mantissa(tl.load(rnorm_k_ptr + column, mask=paired, other=1.0))
    tl.store(similarity_ptr + i, similarity, mask=in_range)


@triton.jit
def queries_of_columns(
    j,
    in_range,
    column_ptr,  # int32 [N], each query's target
    starts_ptr,  # int64 [M + 1], or None: the target is i + offset
    N,
    offset,
):
    """The positions, from and up to, of the queries whose target is column j."""
    if starts_ptr is not None:
        begin = tl.load(starts_ptr + j, mask=in_range, other=0)
        end = tl.load(starts_ptr + j + 1, mask=in_range, other=0)
    else:
        begin = j.to(tl.int64) - offset
        is_query = in_range & (begin >= 0) & (begin < N)
        target = tl.load(column_ptr + begin, mask=is_query, other=-1)
        end = tl.where(is_query & (target == j), begin + 1, begin)
    return begin, end
