"""Gradients of the logits of info_nce_loss in Triton, a chunk of rows at a time.

gradient_kernel owns a tile: it makes the logits again, and writes the gradient of each in the dtype
of the features, G, which two products then turn into gradients of rows. To be of order 1 in any
dtype, G is divided by the largest upstream gradient, and float16 multiplied by `extra`. The one
positive of a row is 0 in G and added in float32 afterwards: where p is nearly 1, 1 - p is nothing
in 16 bits. The gradient of the scale is summed up here, before the rounding.

For negatives G is w_i exp2(l - L_i) + v_j exp2(l - L_j), L being the log-sum-exp of the row and of
the column. While the L are no more than HEADROOM + FOOTROOM apart, one exp2 does, relative to an M:
exp2(l - M) (w_i exp2(M - L_i) + v_j exp2(M - L_j)). M is 0 if it can be: what is subtracted rounds.

A tile is worked on in two halves, left and right: the whole takes more registers than there are.
"""

import triton
import triton.language as tl

from m2ae_kernels.triton._numbers import INF, LOG2E, from_ordered_bits, mantissa, rounded_to
from m2ae_kernels.triton._tiles import entries, halves_of, product, tile_at

HEADROOM = tl.constexpr(100.0)  # exp2(l - M) is at most 2**HEADROOM
FOOTROOM = tl.constexpr(80.0)  # exp2(M - L) is at most 2**FOOTROOM; what is lost of it is 2**-46


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


@triton.jit
def _store_gradients(
    dots,  # [BLOCK_M, WIDTH], part of a tile
    i0,  # its first row in the chunk
    j0,  # its first column
    gradient_out,
    scale,
    inverse,
    reference,
    one_exp,
    column_ptr,
    key_mask_ptr,
    query_ids_ptr,
    key_ids_ptr,
    rnorm_q_ptr,
    rnorm_k_ptr,
    of_rows_ptr,
    of_columns_ptr,
    first,
    rows,
    N,
    M,
    pitch,
    offset,
    SHARES: tl.constexpr,
    SAME_ID: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The part's gradients; and, if SHARES, their sums with the similarities, by rows."""
    local = i0 + tl.arange(0, BLOCK_M)
    i = first + local
    j = j0 + tl.arange(0, WIDTH)
    in_chunk = local < rows
    in_range = j < M
    if rnorm_q_ptr is not None:
        row_factor = mantissa(tl.load(rnorm_q_ptr + i, mask=in_chunk, other=1.0))
        column_factor = mantissa(tl.load(rnorm_k_ptr + j, mask=in_range, other=1.0))
        dots = dots * row_factor[:, None] * column_factor[None, :]
    # Each branch loads its own: numbers of columns that lived through both took too many registers.
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
        if ((start < j0 + WIDTH) & (start + BLOCK_M > j0)) | (j0 + WIDTH > M):
            # Beyond M the products are 0, and the gradients anything.
            gradient = tl.where((i + offset)[:, None] != j[None, :], gradient, 0.0)
            gradient = tl.where(in_range[None, :], gradient, 0.0)
    else:
        column = tl.load(column_ptr + i, mask=in_chunk, other=-2)
        positive, negative = entries(
            i, j, column, key_mask_ptr, query_ids_ptr, key_ids_ptr, M, offset, SAME_ID, EXCLUDE_SELF
        )
        gradient = tl.where(negative, gradient, 0.0)
        if SAME_ID == 2:
            of_positive = _of_positives(dots * scale, of_rows_ptr, N, i, in_chunk, inverse, 1)
            if of_columns_ptr is not None:
                of_positive += _of_positives(
                    dots * scale, of_columns_ptr, M, j, in_range, inverse, 0
                )
            gradient = tl.where(positive, of_positive, gradient)
    shares = 0.0
    if SHARES:
        shares = tl.sum(gradient * dots, axis=1)
    if gradient_out is not None:
        if rnorm_q_ptr is not None:
            gradient = gradient * row_factor[:, None] * column_factor[None, :]
        if BY_DESCRIPTOR:
            gradient = rounded_to(gradient, gradient_out.dtype, INTERPRETED)
            gradient_out.store([i0, j0], gradient)
        else:
            at = gradient_out + local.to(tl.int64)[:, None] * pitch + j[None, :]
            gradient = rounded_to(gradient, gradient_out.dtype.element_ty, INTERPRETED)
            tl.store(at, gradient, mask=in_chunk[:, None] & in_range[None, :])
    return shares


@triton.jit(do_not_specialize=["first", "rows", "N", "M", "offset"])
def gradient_kernel(
    x,  # [N, D], pointer or descriptor
    y,  # [M, D]
    gradient_out,  # [rows, pitch], in the dtype of x; pointer or descriptor; or None
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
    share_parts_ptr,  # out, float32 [column tiles, rows]: in the gradient of the scale; or None
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
    SHARES: tl.constexpr = share_parts_ptr is not None
    WIDTH: tl.constexpr = BLOCK_N // 2
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = tile_at(index, row_tiles, column_tiles, GROUP)
        i0 = row_tile * BLOCK_M
        j0 = column_tile * BLOCK_N
        dots = product(
            x, y, first + i0, j0, first + rows, M, D,
            BLOCK_M, BLOCK_N, BLOCK_K, BY_DESCRIPTOR, INTERPRETED, PRECISION,
        )  # fmt: skip
        left, right = halves_of(dots)
        shares = _store_gradients(
            left, i0, j0, gradient_out, scale, inverse, reference, one_exp, column_ptr,
            key_mask_ptr, query_ids_ptr, key_ids_ptr, rnorm_q_ptr, rnorm_k_ptr,
            of_rows_ptr, of_columns_ptr, first, rows, N, M, pitch, offset,
            SHARES, SAME_ID, EXCLUDE_SELF, DIAGONAL, BLOCK_M, WIDTH, BY_DESCRIPTOR, INTERPRETED,
        )  # fmt: skip
        shares += _store_gradients(
            right, i0, j0 + WIDTH, gradient_out, scale, inverse, reference, one_exp, column_ptr,
            key_mask_ptr, query_ids_ptr, key_ids_ptr, rnorm_q_ptr, rnorm_k_ptr,
            of_rows_ptr, of_columns_ptr, first, rows, N, M, pitch, offset,
            SHARES, SAME_ID, EXCLUDE_SELF, DIAGONAL, BLOCK_M, WIDTH, BY_DESCRIPTOR, INTERPRETED,
        )  # fmt: skip
        if SHARES:
            local = i0 + tl.arange(0, BLOCK_M)
            at = share_parts_ptr + column_tile.to(tl.int64) * rows + local
            tl.store(at, shares, mask=local < rows)
