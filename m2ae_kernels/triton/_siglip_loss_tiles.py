"""Losses of siglip_loss and gradients of its logits in Triton, in one pass over a chunk of rows.

siglip_kernel owns a tile of logits at a time. No softmax couples them, so that losses and gradients
are made together: their sums over the rows of the tile, [column tiles, rows], and, where products
have to follow, the gradients in the dtype of the features, G. To be of order 1 in any dtype, G is
divided by the largest weight of a row, and float16 multiplied by `extra`. A tile is worked on in
two halves, left and right: the whole takes more registers than there are.

Of each entry e is the logit with the sign that is wrong, and -inf if the entry is absent: the loss
is log(1 + exp(e)), its derivative sigma(e) = 1 / (1 + exp(-e)), and neither loses a digit.
"""

import triton
import triton.language as tl

from m2ae_kernels.triton._numbers import INF, exp_of_minus, mantissa, rounded_to
from m2ae_kernels.triton._rows import target_column
from m2ae_kernels.triton._tiles import entries, halves_of, product, sum_over_tiles, tile_at


@triton.jit
def _log1p(u):
    """log(1 + u) for u in [0, 1], with all digits: Chebyshev's interpolation of log(1 + u) / u.

    Its relative error is 5e-9, that of float32 comes on top; ten multiply-adds and no division.
    """
    p = -0.0031760570127516985
    p = p * u + 0.019542526453733444
    p = p * u - 0.056373611092567444
    p = p * u + 0.10543623566627502
    p = p * u - 0.1526966691017151
    p = p * u + 0.1966327428817749
    p = p * u - 0.24951615929603577
    p = p * u + 0.33329710364341736
    p = p * u - 0.49999892711639404
    p = p * u + 1.0
    return p * u


@triton.jit(do_not_specialize=["N", "M", "offset", "ignore_index"])
def row_weights_kernel(
    grad_ptr,  # float32 [N], upstream, or None: 1
    weight_ptr,  # [N] or None: 1
    target_ptr,  # int64 [N] or None
    query_mask_ptr,  # int8 [N] or None
    key_mask_ptr,  # int8 [M] or None
    state_ptr,  # int32 [1]: bits of the largest |row|
    column_ptr,  # out, int32 [N]
    row_ptr,  # out, float32 [N]: what the losses of a row are multiplied with
    N,
    M,
    offset,
    ignore_index,
    BLOCK: tl.constexpr,
):
    # One program owns BLOCK rows.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_range = i < N
    column = target_column(
        i, in_range, target_ptr, query_mask_ptr, key_mask_ptr, M, offset, ignore_index, False
    )
    tl.store(column_ptr + i, column, mask=in_range)
    row = tl.full([BLOCK], 1.0, tl.float32)
    if grad_ptr is not None:
        row = tl.load(grad_ptr + i, mask=in_range, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        row *= tl.load(weight_ptr + i, mask=in_range, other=0.0).to(tl.float32)
    row = tl.where(in_range & (column > -2), row, 0.0)
    tl.store(row_ptr + i, row, mask=in_range)
    size = tl.where(row == row, tl.abs(row), 0.0)
    tl.atomic_max(state_ptr, tl.max(size, axis=0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _entries_of(
    dots,  # [BLOCK_M, WIDTH], part of a tile
    i0,  # its first row in the chunk
    j0,  # its first column
    gradient_out,
    scale,
    bias,
    inverse,
    column_ptr,
    row_ptr,
    key_mask_ptr,
    query_ids_ptr,
    key_ids_ptr,
    rnorm_q_ptr,
    rnorm_k_ptr,
    first,
    rows,
    M,
    pitch,
    offset,
    LOSSES: tl.constexpr,
    BIASES: tl.constexpr,
    SHARES: tl.constexpr,
    SAME_ID: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Stores gradients; returns sums of losses, gradients, those times similarities, by row."""
    local = i0 + tl.arange(0, BLOCK_M)
    i = first + local
    j = j0 + tl.arange(0, WIDTH)
    in_chunk = local < rows
    in_range = j < M
    if rnorm_q_ptr is not None:
        of_row = mantissa(tl.load(rnorm_q_ptr + i, mask=in_chunk, other=1.0))
        of_column = mantissa(tl.load(rnorm_k_ptr + j, mask=in_range, other=1.0))
        dots = dots * of_row[:, None] * of_column[None, :]
    errors = dots * scale + bias
    crosses = True
    if DIAGONAL:
        start = first + i0 + offset
        crosses = (start < j0 + WIDTH) & (start + BLOCK_M > j0)
        if crosses:
            errors = tl.where((i + offset)[:, None] == j[None, :], -errors, errors)
        if j0 + WIDTH > M:
            errors = tl.where(in_range[None, :], errors, -INF)
    else:
        column = tl.load(column_ptr + i, mask=in_chunk, other=-2)
        positive, negative = entries(
            i, j, column, key_mask_ptr, query_ids_ptr, key_ids_ptr, M, offset, SAME_ID, False
        )
        errors = tl.where(negative, errors, tl.where(positive, -errors, -INF))
    losses = tl.zeros([BLOCK_M], tl.float32)
    biases = losses
    shares = losses
    if LOSSES:
        losses = tl.sum(tl.maximum(errors, 0.0), axis=1)
    # exp(-|e|), which both need, and in its sign that of e: two numbers in one register. It is 0
    # only where e is -inf.
    u = exp_of_minus(tl.abs(errors), INTERPRETED)
    u = tl.where(errors > 0, -tl.maximum(u, 1.1754944e-38), u)
    if LOSSES:
        losses += tl.sum(_log1p(tl.abs(u)), axis=1)
    if BIASES or SHARES or gradient_out is not None:
        gradient = tl.where(u < 0, 1.0, u) / (1.0 + tl.abs(u))
        if DIAGONAL:
            if crosses:
                at_target = (i + offset)[:, None] == j[None, :]
                gradient = tl.where(at_target, -gradient, gradient)
        else:
            gradient = tl.where(positive, -gradient, gradient)
        if BIASES:
            biases = tl.sum(gradient, axis=1)
        if SHARES:
            shares = tl.sum(gradient * dots, axis=1)
        if gradient_out is not None:
            row = tl.load(row_ptr + i, mask=in_chunk, other=0.0) * inverse
            if rnorm_q_ptr is not None:
                gradient = gradient * (row * of_row)[:, None] * of_column[None, :]
            else:
                gradient = gradient * row[:, None]
            if BY_DESCRIPTOR:
                gradient = rounded_to(gradient, gradient_out.dtype, INTERPRETED)
                gradient_out.store([i0, j0], gradient)
            else:
                at = gradient_out + local.to(tl.int64)[:, None] * pitch + j[None, :]
                gradient = rounded_to(gradient, gradient_out.dtype.element_ty, INTERPRETED)
                tl.store(at, gradient, mask=in_chunk[:, None] & in_range[None, :])
    return losses, biases, shares


@triton.jit(do_not_specialize=["first", "rows", "M", "offset"])
def siglip_kernel(
    x,  # [N, D], pointer or descriptor
    y,  # [M, D]
    gradient_out,  # [rows, pitch], in the dtype of x, pointer or descriptor; or None
    scale_ptr,  # []
    bias_ptr,  # []
    state_ptr,  # int32 [1]
    column_ptr,  # int32 [N]
    row_ptr,  # float32 [N]
    key_mask_ptr,  # int8 [M] or None
    query_ids_ptr,  # int64 [N] or None
    key_ids_ptr,  # int64 [M] or None
    rnorm_q_ptr,  # float32 [N] or None
    rnorm_k_ptr,  # float32 [M] or None
    loss_parts_ptr,  # out, float32 [column tiles, rows], as the following without weights; or None
    bias_parts_ptr,  # out, the same of gradients, or None
    share_parts_ptr,  # out, the same of gradients times similarities, or None
    first,  # row of this chunk
    rows,  # in this chunk
    M,
    D,
    pitch,
    offset,
    extra,
    SAME_ID: tl.constexpr,
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
    scale = tl.load(scale_ptr).to(tl.float32)
    bias = tl.load(bias_ptr).to(tl.float32)
    largest = tl.load(state_ptr).to(tl.float32, bitcast=True)
    inverse = tl.where(largest > 0, extra / largest, 0.0)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(M, BLOCK_N)
    tiles = row_tiles * column_tiles
    WIDTH: tl.constexpr = BLOCK_N // 2
    LOSSES: tl.constexpr = loss_parts_ptr is not None
    BIASES: tl.constexpr = bias_parts_ptr is not None
    SHARES: tl.constexpr = share_parts_ptr is not None
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = tile_at(index, row_tiles, column_tiles, GROUP)
        i0 = row_tile * BLOCK_M  # within the chunk
        j0 = column_tile * BLOCK_N
        dots = product(
            x, y, first + i0, j0, first + rows, M, D,
            BLOCK_M, BLOCK_N, BLOCK_K, BY_DESCRIPTOR, INTERPRETED, PRECISION,
        )  # fmt: skip
        left, right = halves_of(dots)
        losses, biases, shares = _entries_of(
            left, i0, j0, gradient_out, scale, bias, inverse, column_ptr, row_ptr,
            key_mask_ptr, query_ids_ptr, key_ids_ptr, rnorm_q_ptr, rnorm_k_ptr,
            first, rows, M, pitch, offset, LOSSES, BIASES, SHARES,
            SAME_ID, DIAGONAL, BLOCK_M, WIDTH, BY_DESCRIPTOR, INTERPRETED,
        )  # fmt: skip
        more_losses, more_biases, more_shares = _entries_of(
            right, i0, j0 + WIDTH, gradient_out, scale, bias, inverse, column_ptr, row_ptr,
            key_mask_ptr, query_ids_ptr, key_ids_ptr, rnorm_q_ptr, rnorm_k_ptr,
            first, rows, M, pitch, offset, LOSSES, BIASES, SHARES,
            SAME_ID, DIAGONAL, BLOCK_M, WIDTH, BY_DESCRIPTOR, INTERPRETED,
        )  # fmt: skip
        local = i0 + tl.arange(0, BLOCK_M)
        at = column_tile.to(tl.int64) * rows + local
        if LOSSES:
            tl.store(loss_parts_ptr + at, losses + more_losses, mask=local < rows)
        if BIASES:
            tl.store(bias_parts_ptr + at, biases + more_biases, mask=local < rows)
        if SHARES:
            tl.store(share_parts_ptr + at, shares + more_shares, mask=local < rows)


@triton.jit
def _store_weighed(
    parts_ptr, out_ptr, row, lane, in_range, first, rows, tiles, TILES: tl.constexpr
):
    if parts_ptr is not None:
        zero = tl.zeros(row.shape, tl.float32)
        total = sum_over_tiles(parts_ptr, tiles, rows, lane, in_range, zero, TILES)
        tl.store(out_ptr + first + lane, row * total, mask=in_range)


@triton.jit(do_not_specialize=["first", "rows", "column_tiles"])
def weigh_kernel(
    loss_parts_ptr,  # float32 [column tiles, rows] or None
    bias_parts_ptr,  # the same
    share_parts_ptr,  # the same
    row_ptr,  # float32 [N]
    losses_ptr,  # out, float32 [N], or None
    biases_ptr,  # out, float32 [N], or None: each row's share in the gradient of the bias
    shares_ptr,  # out, float32 [N], or None: and in that of the scale
    first,
    rows,
    column_tiles,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    # One program owns BLOCK rows.
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = lane < rows
    row = tl.load(row_ptr + first + lane, mask=ok, other=0.0)
    _store_weighed(loss_parts_ptr, losses_ptr, row, lane, ok, first, rows, column_tiles, TILES)
    _store_weighed(bias_parts_ptr, biases_ptr, row, lane, ok, first, rows, column_tiles, TILES)
    _store_weighed(share_parts_ptr, shares_ptr, row, lane, ok, first, rows, column_tiles, TILES)
