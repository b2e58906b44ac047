"""What the backward of info_nce_loss knows of each row and each column, in Triton; vectors only."""

import triton
import triton.language as tl

from m2ae_kernels.triton._numbers import (
    INF,
    LOG2E,
    exp_of,
    log1p_exp,
    ordered_bits,
    sigmoid,
)
from m2ae_kernels.triton._rows import target_column
from m2ae_kernels.triton._tiles import sum_over_tiles


@triton.jit
def _store_side(
    of_side_ptr,  # float32 [planes, n]
    n,
    at,
    in_range,
    grad,
    neg,
    pos,
    number,
    state_ptr,
    SAME_ID: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What gradient_kernel reads of rows or columns, and the largest of all."""
    in_loss = in_range & (number > 0)
    grad = tl.where(in_loss, grad, 0.0)
    # What a large logarithm loses in float32 goes into the gradient, as a factor of nearly 1.
    exactly = (pos + log1p_exp(neg)).to(tl.float64) * LOG2E
    log_sum = exactly.to(tl.float32)
    lost = (exactly - log_sum.to(tl.float64)).to(tl.float32)
    weight = grad * tl.where(in_loss & (tl.abs(log_sum) < INF), tl.exp2(-lost), 1.0)
    step = n.to(tl.int64)
    of_side_ptr += at
    tl.store(of_side_ptr, tl.where(in_loss, log_sum, INF), mask=in_range)
    tl.store(of_side_ptr + step, weight, mask=in_range)
    if SAME_ID == 2:
        tl.store(of_side_ptr + 2 * step, pos * LOG2E, mask=in_range)
        tl.store(of_side_ptr + 3 * step, sigmoid(neg), mask=in_range)
        tl.store(of_side_ptr + 4 * step, number, mask=in_range)
    largest = tl.abs(grad)
    largest = tl.max(tl.where(largest == largest, largest, 0.0), axis=0)
    tl.atomic_max(state_ptr, largest.to(tl.int32, bitcast=True), sem="relaxed")
    # A NaN is no bound. A row that is not in the loss bounds its negatives all the same.
    is_number = in_range & (log_sum == log_sum)
    lowest = tl.max(tl.where(is_number & in_loss, -log_sum, -INF), axis=0)
    tl.atomic_max(state_ptr + 2, ordered_bits(lowest), sem="relaxed")
    if ROWS:
        highest = tl.where(in_loss, log_sum, neg * LOG2E)
        is_number = in_range & (highest == highest)
        highest = tl.max(tl.where(is_number, highest, -INF), axis=0)
        tl.atomic_max(state_ptr + 1, ordered_bits(highest), sem="relaxed")


@triton.jit(do_not_specialize=["N", "M", "offset", "ignore_index"])
def sides_kernel(
    grad_q_ptr, neg_q_ptr, pos_q_ptr, num_q_ptr,  # float32 [N] each
    grad_k_ptr, neg_k_ptr, pos_k_ptr, num_k_ptr,  # float32 [M] each, or None if not symmetric
    target_ptr,  # int64 [N] or None
    query_mask_ptr,  # int8 [N] or None
    key_mask_ptr,  # int8 [M] or None
    state_ptr,  # int32 [3]: bits of the largest |grad|; highest, and minus the lowest log-sum-exp
    column_ptr,  # out, int32 [N]
    dpos_ptr,  # out, float32 [N], gradient of each row's logit at its target; None for several
    of_rows_ptr,  # out, float32 [planes, N]: log-sum-exp to base 2, gradient, and so on
    of_columns_ptr,  # out, float32 [planes, M], or None
    N,
    M,
    offset,
    ignore_index,
    SAME_ID: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK rows or BLOCK columns.
    block = tl.program_id(0)
    blocks_of_rows = tl.cdiv(N, BLOCK)
    if block < blocks_of_rows:
        i = block * BLOCK + tl.arange(0, BLOCK)
        in_range = i < N
        column = target_column(
            i, in_range, target_ptr, query_mask_ptr, key_mask_ptr, M, offset, ignore_index,
            EXCLUDE_SELF,
        )  # fmt: skip
        tl.store(column_ptr + i, column, mask=in_range)
        grad = tl.load(grad_q_ptr + i, mask=in_range, other=0.0)
        neg = tl.load(neg_q_ptr + i, mask=in_range, other=-INF)
        pos = tl.load(pos_q_ptr + i, mask=in_range, other=0.0)
        number = tl.load(num_q_ptr + i, mask=in_range, other=0.0)
        _store_side(of_rows_ptr, N, i, in_range, grad, neg, pos, number, state_ptr, SAME_ID, True)
        if dpos_ptr is not None:
            paired = in_range & (column >= 0)
            dpos = tl.where(number > 0, -grad * sigmoid(neg), 0.0)
            if grad_k_ptr is not None:
                grad = tl.load(grad_k_ptr + column, mask=paired, other=0.0)
                neg = tl.load(neg_k_ptr + column, mask=paired, other=-INF)
                log_sum = tl.load(pos_k_ptr + column, mask=paired, other=0.0)
                number = tl.load(num_k_ptr + column, mask=paired, other=0.0)
                share = tl.where(number == 1, 1.0, exp_of(pos - log_sum))
                uneven = share - 1.0 / tl.maximum(number, 1.0)
                dpos += tl.where(number > 0, grad * (uneven - share * sigmoid(neg)), 0.0)
            tl.store(dpos_ptr + i, tl.where(paired, dpos, 0.0), mask=in_range)
    elif grad_k_ptr is not None:
        j = (block - blocks_of_rows) * BLOCK + tl.arange(0, BLOCK)
        in_range = j < M
        grad = tl.load(grad_k_ptr + j, mask=in_range, other=0.0)
        neg = tl.load(neg_k_ptr + j, mask=in_range, other=-INF)
        pos = tl.load(pos_k_ptr + j, mask=in_range, other=0.0)
        number = tl.load(num_k_ptr + j, mask=in_range, other=0.0)
        _store_side(
            of_columns_ptr, M, j, in_range, grad, neg, pos, number, state_ptr, SAME_ID, False
        )


@triton.jit(do_not_specialize=["first", "rows", "column_tiles"])
def shares_kernel(
    share_parts_ptr,  # float32 [column tiles, rows]
    dpos_ptr,  # float32 [N], gradient of each row's logit at its target; or None
    similarity_ptr,  # float32 [N], of the row and its target; or None
    state_ptr,  # int32, bits of what the gradients were divided by
    shares_ptr,  # out, float32 [N], of each row in the gradient of the scale
    first,
    rows,
    column_tiles,
    extra,  # what the gradients were multiplied with
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    # One program owns BLOCK rows.
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = lane < rows
    zero = tl.zeros([BLOCK], tl.float32)
    share = sum_over_tiles(share_parts_ptr, column_tiles, rows, lane, in_range, zero, TILES)
    share *= tl.load(state_ptr).to(tl.float32, bitcast=True) / extra
    if dpos_ptr is not None:
        dpos = tl.load(dpos_ptr + first + lane, mask=in_range, other=0.0)
        share += dpos * tl.load(similarity_ptr + first + lane, mask=in_range, other=0.0)
    tl.store(shares_ptr + first + lane, share, mask=in_range)
