"""Gradients of the logits of info_nce_loss in Triton, a chunk of rows at a time.

gradient_kernel owns a tile: it makes the logits again, and writes the gradient of each in the
dtype of the features, G, which two products then turn into gradients of rows. To be of order 1 in
any dtype, G is divided by the largest upstream gradient, and float16 multiplied by EXTRA; the
positive of a row with one target is 0 in G and added in float32 afterwards (dpos), because 1 - p
rounded to 16 bits is nothing, where p is nearly 1.

For negatives G is w_i exp2(l - L_i) + v_j exp2(l - L_j), L being the log-sum-exp of the row and of
the column. While the L are no more than HEADROOM + FOOTROOM apart, one exp2 does, relative to an M:
exp2(l - M) (w_i exp2(M - L_i) + v_j exp2(M - L_j)). M is 0 if it can be: what is subtracted rounds.
"""

import triton
import triton.language as tl

from m2ae_kernels.triton._numbers import (
    INF,
    LOG2E,
    exp_of,
    from_ordered_bits,
    log1p_exp,
    mantissa,
    ordered_bits,
    rounded_to,
    sigmoid,
)
from m2ae_kernels.triton._rows import target_column
from m2ae_kernels.triton._tiles import entries, product, tile_at

HEADROOM = tl.constexpr(100.0)  # exp2(l - M) is at most 2**HEADROOM
FOOTROOM = tl.constexpr(80.0)  # exp2(M - L) is at most 2**FOOTROOM; what is lost of it is 2**-46


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


@triton.jit
def _load_side(of_side_ptr, n, at, in_range, inverse):
    """Log-sum-exp and gradient. Where nothing is in the loss they are inf and 0."""
    log_sum = tl.load(of_side_ptr + at, mask=in_range, other=INF)
    grad = tl.load(of_side_ptr + n.to(tl.int64) + at, mask=in_range, other=0.0)
    return log_sum, grad * inverse


@triton.jit
def _of_positives(logits, of_side_ptr, n, at, in_range, inverse, AXIS: tl.constexpr):
    """Gradients of the logits of several positives: of the losses of rows, or of columns."""
    _, grad = _load_side(of_side_ptr, n, at, in_range, inverse)
    of_side_ptr += at
    step = n.to(tl.int64)
    log_positives = tl.load(of_side_ptr + 2 * step, mask=in_range, other=0.0)
    odds = tl.load(of_side_ptr + 3 * step, mask=in_range, other=0.0)
    number = tl.load(of_side_ptr + 4 * step, mask=in_range, other=0.0)
    share = tl.exp2(logits - tl.expand_dims(log_positives, AXIS))
    share = tl.where(tl.expand_dims(number, AXIS) == 1, 1.0, share)
    uneven = share - tl.expand_dims(1.0 / tl.maximum(number, 1.0), AXIS)
    gradient = tl.expand_dims(grad, AXIS) * (uneven - share * tl.expand_dims(odds, AXIS))
    return tl.where(tl.expand_dims(number, AXIS) > 0, gradient, 0.0)


@triton.jit(do_not_specialize=["first", "rows", "N", "M", "offset"])
def gradient_kernel(
    x,  # [N, D], pointer or descriptor
    y,  # [M, D]
    gradient_out,  # [rows, pitch], in the dtype of x; pointer or descriptor
    scale_ptr,  # []
    state_ptr,  # int32 [3]
    column_ptr,  # int32 [N]
    key_mask_ptr,  # int8 [M] or None
    query_ids_ptr,  # int64 [N] or None
    key_ids_ptr,  # int64 [M] or None
    rnorm_q_ptr,  # float32 [N] or None
    rnorm_k_ptr,  # float32 [M] or None
    of_rows_ptr,  # float32 [planes, N]
    of_columns_ptr,  # float32 [planes, M], or None if not symmetric
    first,  # row of this chunk
    rows,  # in this chunk
    N,
    M,
    D,
    pitch,
    offset,
    extra,
    SAME_ID: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    DIAGONAL: tl.constexpr,  # all entries are negative, but (i, i + offset): no mask, target, ids
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tl.assume(D > 0)
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    largest = tl.load(state_ptr).to(tl.float32, bitcast=True)
    inverse = tl.where(largest > 0, extra / largest, 0.0)
    highest = from_ordered_bits(tl.load(state_ptr + 1))
    lowest = -from_ordered_bits(tl.load(state_ptr + 2))
    one_exp = highest - lowest <= HEADROOM + FOOTROOM  # not if inf or NaN
    reference = tl.minimum(tl.maximum(tl.ceil(highest) - HEADROOM, 0.0), lowest + FOOTROOM)

    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(M, BLOCK_N)
    tiles = row_tiles * column_tiles
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = tile_at(index, row_tiles, column_tiles, GROUP)
        i0 = row_tile * BLOCK_M
        j0 = column_tile * BLOCK_N
        dots = product(
            x, y, first + i0, j0, first + rows, M, D,
            BLOCK_M, BLOCK_N, BLOCK_K, BY_DESCRIPTOR, INTERPRETED, PRECISION,
        )  # fmt: skip
        local = i0 + tl.arange(0, BLOCK_M)
        i = first + local
        j = j0 + tl.arange(0, BLOCK_N)
        in_chunk = local < rows
        in_range = j < M
        if rnorm_q_ptr is not None:
            row_factor = mantissa(tl.load(rnorm_q_ptr + i, mask=in_chunk, other=1.0))
            column_factor = mantissa(tl.load(rnorm_k_ptr + j, mask=in_range, other=1.0))
            dots = dots * row_factor[:, None] * column_factor[None, :]
        # Each branch loads its own: numbers of columns that lived through both took too many
        # registers.
        if one_exp:
            gradient = tl.exp2(dots * scale - reference)
            log_sum, grad = _load_side(of_rows_ptr, N, i, in_chunk, inverse)
            weight_q = grad * tl.exp2(reference - log_sum)
            if of_columns_ptr is not None:
                log_sum, grad = _load_side(of_columns_ptr, M, j, in_range, inverse)
                weight_k = grad * tl.exp2(reference - log_sum)
                gradient = gradient * (weight_q[:, None] + weight_k[None, :])
            else:
                gradient = gradient * weight_q[:, None]
        else:
            log_sum, grad = _load_side(of_rows_ptr, N, i, in_chunk, inverse)
            gradient = grad[:, None] * tl.exp2(dots * scale - log_sum[:, None])
            if of_columns_ptr is not None:
                log_sum, grad = _load_side(of_columns_ptr, M, j, in_range, inverse)
                gradient += grad[None, :] * tl.exp2(dots * scale - log_sum[None, :])
        if DIAGONAL:
            start = first + i0 + offset
            if (start < j0 + BLOCK_N) & (start + BLOCK_M > j0):
                gradient = tl.where((i + offset)[:, None] != j[None, :], gradient, 0.0)
        else:
            column = tl.load(column_ptr + i, mask=in_chunk, other=-2)
            positive, negative = entries(
                i, j, column, key_mask_ptr, query_ids_ptr, key_ids_ptr, M, offset,
                SAME_ID, EXCLUDE_SELF,
            )  # fmt: skip
            gradient = tl.where(negative, gradient, 0.0)
            if SAME_ID == 2:
                of_positive = _of_positives(dots * scale, of_rows_ptr, N, i, in_chunk, inverse, 1)
                if of_columns_ptr is not None:
                    of_positive += _of_positives(
                        dots * scale, of_columns_ptr, M, j, in_range, inverse, 0
                    )
                gradient = tl.where(positive, of_positive, gradient)
        if rnorm_q_ptr is not None:
            gradient = gradient * row_factor[:, None] * column_factor[None, :]
        if BY_DESCRIPTOR:
            gradient = rounded_to(gradient, gradient_out.dtype, INTERPRETED)
            gradient_out.store([i0, j0], gradient)
        else:
            at = gradient_out + local.to(tl.int64)[:, None] * pitch + j[None, :]
            gradient = rounded_to(gradient, gradient_out.dtype.element_ty, INTERPRETED)
            tl.store(at, gradient, mask=in_chunk[:, None] & in_range[None, :])
