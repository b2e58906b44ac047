"""Backward of expert_mlp in Triton, but for plain products. Math: m2ae_kernels/ops/expert_mlp.py

Rows are in the order of the sort. First the gradients by the experts' outputs, g, and what is known
of those by the router weights; then products of g with w2 become gradients by h, while h is turned
into w a, which the gradient of w2 takes, and into the rest of the gradients by the router weights,
<da', a>, a sum per tile of columns.
"""

import triton
import triton.language as tl

from m2ae_kernels.triton._activations import activated, slope
from m2ae_kernels.triton._grouped_rows import product_of_rows
from m2ae_kernels.triton._grouped_tiles import tile_of_program
from m2ae_kernels.triton._numbers import float32_of, rounded_to
from m2ae_kernels.triton._philox import dropped
from m2ae_kernels.triton._tiles import halves_of, sum_over_tiles

PART = tl.constexpr(32)  # columns of a product that are worked on together


@triton.jit(do_not_specialize=["N", "threshold"])
def expert_output_gradient_kernel(
    grad_ptr,  # contiguous, [R, Do]
    y_ptr,  # contiguous, [N, Do], or None without an output activation
    bias_ptr,  # contiguous, [E, Do], or None
    ids_ptr,  # int32 [N]
    ends_ptr,  # int32 [E]
    weights_ptr,  # float32 [R k], or None if they are not applied to the output
    seed_ptr,  # int64 [2], or None: no dropout
    g_ptr,  # out, [N, Do], without the router weight
    by_weight_ptr,  # out, float32 [N]: <g, bias>, or <grad, output> for an output activation
    parts_ptr,  # out, float32 [row tiles, Do], sums of weight times g; or None
    N,
    E,
    C,  # Do
    slots,  # per row of the routing
    threshold,
    scale,
    ACTIVATION: tl.constexpr,
    WHICH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # One program owns BLOCK_M rows.
    group, first, end, _, tile = tile_of_program(ends_ptr, N, E, 1, BLOCK_M, 1, GROUPS, 1)
    if (first < end) & (group < E):
        row = first + tl.arange(0, BLOCK_M)
        inside = row < end
        slot = tl.load(ids_ptr + row, mask=inside, other=-1)
        present = slot >= 0
        weight = tl.full([BLOCK_M], 1.0, tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + slot, mask=present, other=0.0)
        grad_rows = grad_ptr + (slot // slots).to(tl.int64) * C
        by_weight = tl.zeros([BLOCK_M], tl.float32)
        for column in range(0, C, BLOCK_C):
            c = column + tl.arange(0, BLOCK_C)
            mask = present[:, None] & (c < C)[None, :]
            at_rows = row.to(tl.int64)[:, None] * C + c[None, :]
            at = grad_rows[:, None] + c[None, :]
            g = float32_of(tl.load(at, mask=mask, other=0.0), INTERPRETED)
            if seed_ptr is not None:
                g = dropped(g, slot, column, seed_ptr, threshold, scale, WHICH)
            if y_ptr is not None:
                y = float32_of(tl.load(y_ptr + at_rows, mask=mask, other=0.0), INTERPRETED)
                by_weight += tl.sum(g * activated(y, ACTIVATION), axis=1)
                g *= slope(y, ACTIVATION)
            elif bias_ptr is not None:
                at = bias_ptr + group.to(tl.int64) * C + c
                bias = float32_of(tl.load(at, mask=c < C, other=0.0), INTERPRETED)
                by_weight += tl.sum(g * bias[None, :], axis=1)
            if parts_ptr is not None:
                sums = tl.sum(g * weight[:, None], axis=0)
                tl.store(parts_ptr + tile.to(tl.int64) * C + c, sums, mask=c < C)
            g = rounded_to(g, g_ptr.dtype.element_ty, INTERPRETED)
            tl.store(g_ptr + at_rows, g, mask=inside[:, None] & (c < C)[None, :])
        tl.store(by_weight_ptr + row, by_weight, mask=inside)


@triton.jit
def _by_hidden(
    by_a,  # [BLOCK_M, WIDTH], a tile or part of one: w2^T g
    row,
    inside,
    slot,
    weight,
    column,  # its first
    tile,
    h_ptr,
    seed_ptr,
    by_h_ptr,
    a_ptr,
    parts_ptr,
    C,
    threshold,
    scale,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    WHICH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Stores gradients by h, and weighted activated rows; returns <da', a> of each row.

    In parts, because a tile takes more registers than there are.
    """
    WIDTH: tl.constexpr = by_a.shape[1]
    if WIDTH > PART:
        left, right = halves_of(by_a)
        shares = _by_hidden(
            left, row, inside, slot, weight, column, tile,
            h_ptr, seed_ptr, by_h_ptr, a_ptr, parts_ptr, C, threshold, scale,
            ACTIVATION, GLU, WHICH, INTERPRETED,
        )  # fmt: skip
        shares += _by_hidden(
            right, row, inside, slot, weight, column + WIDTH // 2, tile,
            h_ptr, seed_ptr, by_h_ptr, a_ptr, parts_ptr, C, threshold, scale,
            ACTIVATION, GLU, WHICH, INTERPRETED,
        )  # fmt: skip
    else:
        HALVES: tl.constexpr = 2 if GLU else 1
        dtype: tl.constexpr = by_h_ptr.dtype.element_ty
        c = column + tl.arange(0, WIDTH)
        in_columns = c < C
        row_64 = row.to(tl.int64)
        at = row_64[:, None] * (HALVES * C) + c[None, :]
        at_parts = tile.to(tl.int64) * (HALVES * C) + c
        stored = inside[:, None] & in_columns[None, :]
        read = (slot >= 0)[:, None] & in_columns[None, :]
        h = float32_of(tl.load(h_ptr + at, mask=read, other=0.0), INTERPRETED)
        if seed_ptr is not None:
            by_a = dropped(by_a, slot, column, seed_ptr, threshold, scale, WHICH)
        a = activated(h, ACTIVATION)
        by_h = slope(h, ACTIVATION) * by_a
        if GLU:
            up = float32_of(tl.load(h_ptr + at + C, mask=read, other=0.0), INTERPRETED)
            by_up = by_a * a * weight[:, None]
            tl.store(by_h_ptr + at + C, rounded_to(by_up, dtype, INTERPRETED), mask=stored)
            if parts_ptr is not None:
                tl.store(parts_ptr + at_parts + C, tl.sum(by_up, axis=0), mask=in_columns)
            by_h *= up
            a *= up
        by_h *= weight[:, None]
        tl.store(by_h_ptr + at, rounded_to(by_h, dtype, INTERPRETED), mask=stored)
        if parts_ptr is not None:
            tl.store(parts_ptr + at_parts, tl.sum(by_h, axis=0), mask=in_columns)
        shares = tl.sum(by_a * a, axis=1)
        if a_ptr is not None:
            a *= weight[:, None]
            if seed_ptr is not None:
                a = dropped(a, slot, column, seed_ptr, threshold, scale, WHICH)
            at_a = a_ptr + row_64[:, None] * C + c[None, :]
            tl.store(at_a, rounded_to(a, dtype, INTERPRETED), mask=stored)
    return shares


@triton.jit(do_not_specialize=["N", "threshold"])
def expert_hidden_gradient_kernel(
    g_ptr,  # contiguous, [N, Do]
    w2,  # [E, Do, H]
    h_ptr,  # contiguous, [N, H or 2 H]
    ids_ptr,  # int32 [N]
    ends_ptr,  # int32 [E]
    weights_ptr,  # float32 [R k], or None if they are not applied to the output
    seed_ptr,  # int64 [2], or None: no dropout
    by_h_ptr,  # out, [N, H or 2 H]
    a_ptr,  # out, [N, H], weight times the activated rows; or None
    shares_ptr,  # out, float32 [column tiles, N]: <da', a>
    parts_ptr,  # out, float32 [row tiles, H or 2 H], sums of by_h; or None
    N,
    E,
    K,  # Do
    C,  # H
    b_group,  # strides of w2
    b_depth,
    b_column,
    threshold,
    scale,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    WHICH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    STRIP: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One program owns a tile of hidden channels.
    group, first, end, column, tile = tile_of_program(
        ends_ptr, N, E, C, BLOCK_M, BLOCK_N, GROUPS, STRIP
    )
    if (first < end) & (group < E):
        row = first + tl.arange(0, BLOCK_M)
        inside = row < end
        c = column + tl.arange(0, BLOCK_N)
        b = w2 + group.to(tl.int64) * b_group
        by_a = product_of_rows(
            g_ptr + row.to(tl.int64) * K, inside, None, None, b + c.to(tl.int64) * b_column, c < C,
            K, K, 1, b_depth, BLOCK_M, BLOCK_N, BLOCK_K, INTERPRETED, PRECISION,
        )  # fmt: skip
        slot = tl.load(ids_ptr + row, mask=inside, other=-1)
        weight = tl.full([BLOCK_M], 1.0, tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + slot, mask=slot >= 0, other=0.0)
        shares = _by_hidden(
            by_a, row, inside, slot, weight, column, tile,
            h_ptr, seed_ptr, by_h_ptr, a_ptr, parts_ptr, C, threshold, scale,
            ACTIVATION, GLU, WHICH, INTERPRETED,
        )  # fmt: skip
        at_shares = shares_ptr + (column // BLOCK_N).to(tl.int64) * N + row
        tl.store(at_shares, shares, mask=inside)


@triton.jit(do_not_specialize=["N", "T"])
def expert_input_gradient_kernel(
    by_u_ptr,  # contiguous, [N, D], multiplied with the weights in place
    x_ptr,  # contiguous, [T, D]
    shift_ptr,  # contiguous, [S, D], or None
    ids_ptr,  # int32 [N]
    weights_ptr,  # float32 [R k]
    by_weight_ptr,  # out, float32 [N]
    N,
    T,
    C,  # D
    slots,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # Weights at the input. One program owns BLOCK_M rows; those without a slot stay as they are.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.load(ids_ptr + row, mask=row < N, other=-1)
    present = slot >= 0
    weight = tl.load(weights_ptr + slot, mask=present, other=0.0)
    x_rows = x_ptr + (slot // slots % T).to(tl.int64) * C
    by_weight = tl.zeros([BLOCK_M], tl.float32)
    for column in range(0, C, BLOCK_C):
        c = column + tl.arange(0, BLOCK_C)
        mask = present[:, None] & (c < C)[None, :]
        at = by_u_ptr + row.to(tl.int64)[:, None] * C + c[None, :]
        by_u = float32_of(tl.load(at, mask=mask, other=0.0), INTERPRETED)
        u = float32_of(tl.load(x_rows[:, None] + c[None, :], mask=mask, other=0.0), INTERPRETED)
        if shift_ptr is not None:
            at_shift = shift_ptr + ((slot // slots // T).to(tl.int64) * C)[:, None] + c[None, :]
            u += float32_of(tl.load(at_shift, mask=mask, other=0.0), INTERPRETED)
        by_weight += tl.sum(by_u * u, axis=1)
        by_u = rounded_to(by_u * weight[:, None], by_u_ptr.dtype.element_ty, INTERPRETED)
        tl.store(at, by_u, mask=mask)
    tl.store(by_weight_ptr + row, by_weight, mask=present)


@triton.jit(do_not_specialize=["R", "N"])
def router_gradient_kernel(
    by_weight_ptr,  # float32 [N], or None
    shares_ptr,  # float32 [tiles, N], or None
    inverse_ptr,  # int32 [R k]
    out_ptr,  # float32 [R k]
    R,  # times k
    N,
    tiles,
    BLOCK: tl.constexpr,
    ADDED: tl.constexpr,
):
    # One program owns BLOCK slots; one that is nowhere gets 0.
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(inverse_ptr + slot, mask=slot < R, other=-1)
    present = row >= 0
    total = tl.load(by_weight_ptr + row, mask=present, other=0.0)
    if shares_ptr is not None:
        total = sum_over_tiles(shares_ptr, tiles, N, row, present, total, ADDED)
    tl.store(out_ptr + slot, total, mask=slot < R)
