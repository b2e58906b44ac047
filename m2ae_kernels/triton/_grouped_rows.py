"""Products of rows in groups with one matrix each, in Triton, with what comes before and after.

One kernel serves grouped_mm, both layers of expert_mlp, and the gradients of rows of both: rows
may be gathered, shifted and weighted; the sums get a bias, are rounded and stored, activated,
dropped out, rounded and stored. Of a gated unit, the left half of a tile is gates and the right
half what they gate, so that one product makes both.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from m2ae_kernels.ops._activations import IDENTITY, is_glu
from m2ae_kernels.ops._philox import HIDDEN
from m2ae_kernels.triton._activations import activated, constants_of
from m2ae_kernels.triton._grouped_tiles import (
    STRIP,
    Table,
    Tile,
    choose_tile,
    lanes_of,
    tile_of_program,
    tiles_of_rows,
)
from m2ae_kernels.triton._numbers import float32_of, rounded_to
from m2ae_kernels.triton._philox import Dropout, dropout, dropped
from m2ae_kernels.triton._tiles import halves_of

TILES: Table = {
    ("16-bit", 0): (Tile(16, 64, 64, 4, 1), Tile(64, 64, 64, 4, 1), Tile(64, 128, 64, 4, 1)),
    ("16-bit", 8): (
        Tile(16, 128, 64, 4, 4),
        Tile(32, 128, 64, 4, 4),
        Tile(64, 128, 64, 4, 3),
        Tile(128, 128, 64, 8, 3),
    ),
    ("16-bit", 9): (
        Tile(16, 128, 64, 4, 4),
        Tile(32, 128, 64, 4, 4),
        Tile(64, 128, 64, 4, 4),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 256, 64, 8, 3),
    ),
    ("16-bit", 10): (
        Tile(16, 128, 64, 4, 4),
        Tile(32, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(128, 64, 64, 8, 4),
    ),
    ("16-bit", 12): (
        Tile(16, 128, 64, 4, 3),
        Tile(32, 128, 64, 4, 3),
        Tile(64, 128, 64, 4, 2),
        Tile(128, 128, 64, 8, 2),
    ),
    ("odd 16-bit", 0): (Tile(16, 64, 64, 4, 1), Tile(64, 64, 64, 4, 1), Tile(64, 128, 64, 4, 1)),
    ("odd 16-bit", 8): (Tile(16, 64, 32, 4, 2), Tile(64, 64, 32, 8, 2)),
    ("tf32", 8): (Tile(16, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(128, 64, 32, 8, 3)),
    ("tf32", 10): (Tile(16, 64, 32, 4, 3), Tile(64, 64, 32, 8, 3)),
    ("tf32", 12): (Tile(16, 64, 32, 4, 3), Tile(64, 64, 32, 8, 2)),
    ("float32", 0): (Tile(16, 64, 64, 4, 1), Tile(64, 64, 64, 4, 1), Tile(64, 128, 64, 4, 1)),
    ("float32", 8): (Tile(16, 64, 16, 4, 2), Tile(64, 64, 16, 4, 2)),
    ("float32", 10): (Tile(16, 64, 16, 4, 2), Tile(32, 64, 16, 4, 2)),
}
PART = tl.constexpr(64)  # columns of a product that are worked on together


class Gather(NamedTuple):
    """Where rows are read, and what is done to them."""

    ids: Tensor | None  # int32 [N], row -> slot; -1 is a row of zeros
    k: int  # slots per row of the routing
    T: int  # rows that there are; slot i reads row i // k % T
    of_slots: bool = True  # rows without a slot are zeros, without a bias
    reads: bool = True  # the rows are elsewhere, not yet in their order
    shift: Tensor | None = None  # [S, D], added to the rows of each stream
    weights: Tensor | None = None  # float32 [R k], multiplied with them


@triton.jit
def product_of_rows(
    a_rows,  # [BLOCK_M], pointers to rows
    present,  # [BLOCK_M], others are zeros
    shift_rows,  # [BLOCK_M], pointers to what is added, or None
    factor,  # float32 [BLOCK_M] that rows are multiplied with, or None
    b_columns,  # [BLOCK_N], pointers to columns
    in_columns,  # [BLOCK_N]
    depth,  # K, or 0
    K,
    a_depth,  # strides
    b_depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows times columns, [BLOCK_M, BLOCK_N] in float32."""
    dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        in_depth = k < K
        at_a = a_rows[:, None] + (k.to(tl.int64) * a_depth)[None, :]
        at_b = b_columns[None, :] + (k.to(tl.int64) * b_depth)[:, None]
        a = tl.load(at_a, mask=present[:, None] & in_depth[None, :], other=0.0)
        b = tl.load(at_b, mask=in_depth[:, None] & in_columns[None, :], other=0.0)
        if shift_rows is not None or factor is not None:
            dtype: tl.constexpr = a.dtype
            a = float32_of(a, INTERPRETED)
            if shift_rows is not None:
                at_shift = shift_rows[:, None] + k[None, :]
                mask = present[:, None] & in_depth[None, :]
                a += float32_of(tl.load(at_shift, mask=mask, other=0.0), INTERPRETED)
            if factor is not None:
                a *= factor[:, None]
            a = rounded_to(a, dtype, INTERPRETED)
        if INTERPRETED:
            a = float32_of(a, True)
            b = float32_of(b, True)
        dots = tl.dot(a, b, dots, input_precision=PRECISION)
    return dots


@triton.jit
def _biased(dots, bias_ptr, c, columns, live, INTERPRETED: tl.constexpr):
    """Sums with their bias, in rows that have one; others are zeros."""
    if bias_ptr is not None:
        bias = float32_of(tl.load(bias_ptr + c, mask=columns, other=0.0), INTERPRETED)
        dots = tl.where(live[:, None], dots + bias[None, :], 0.0)
    return dots


@triton.jit
def _rounded(dots, h_ptr, at, mask, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """What is stored before an activation, and what goes into it."""
    h = rounded_to(dots, dtype, INTERPRETED)
    if h_ptr is not None:
        tl.store(h_ptr + at, h, mask=mask)
    return float32_of(h, INTERPRETED)


@triton.jit
def _store(
    dots,  # [BLOCK_M, WIDTH], a tile or part of one
    up,  # what it gates, for a gated unit
    out_rows,  # [BLOCK_M], pointers
    h_rows,  # int64 [BLOCK_M], where rows of h begin
    h_ptr,
    bias_ptr,  # of this group
    inside,
    live,
    slot,
    column,  # the first
    seed_ptr,
    C,
    out_column,
    threshold,
    scale,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    ROUNDED: tl.constexpr,
    WHICH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """What follows the product; in parts, because a tile takes more registers than there are."""
    WIDTH: tl.constexpr = dots.shape[1]
    if WIDTH > PART:
        left, right = halves_of(dots)
        up_left = left
        up_right = right
        if GLU:
            up_left, up_right = halves_of(up)
        _store(
            left, up_left, out_rows, h_rows, h_ptr, bias_ptr, inside, live, slot, column,
            seed_ptr, C, out_column, threshold, scale,
            ACTIVATION, GLU, ROUNDED, WHICH, INTERPRETED,
        )  # fmt: skip
        _store(
            right, up_right, out_rows, h_rows, h_ptr, bias_ptr, inside, live, slot,
            column + WIDTH // 2, seed_ptr, C, out_column, threshold, scale,
            ACTIVATION, GLU, ROUNDED, WHICH, INTERPRETED,
        )  # fmt: skip
    else:
        dtype: tl.constexpr = out_rows.dtype.element_ty
        c = column + tl.arange(0, WIDTH)
        mask = inside[:, None] & (c < C)[None, :]
        dots = _biased(dots, bias_ptr, c, c < C, live, INTERPRETED)
        if GLU:
            up = _biased(up, bias_ptr, C + c, c < C, live, INTERPRETED)
        if ROUNDED:
            at = h_rows[:, None] + c[None, :]
            dots = _rounded(dots, h_ptr, at, mask, dtype, INTERPRETED)
            if GLU:
                up = _rounded(up, h_ptr, at + C, mask, dtype, INTERPRETED)
        values = activated(dots, ACTIVATION)
        if GLU:
            values *= up
        if seed_ptr is not None:
            values = dropped(values, slot, column, seed_ptr, threshold, scale, WHICH)
        at_out = out_rows[:, None] + (c.to(tl.int64) * out_column)[None, :]
        tl.store(at_out, rounded_to(values, dtype, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["N", "T", "threshold"])
def grouped_rows_kernel(
    a,  # rows [N, K], or [T, K] of which `ids` tells; or [E, N, K]
    b,  # [E, K, C], or [E, K, 2 C] for a gated unit
    out,  # [N, C] or [E, N, C]
    h_ptr,  # out, contiguous, what is activated, [N, C or 2 C], with ROUNDED; or None
    bias_ptr,  # contiguous, [E, C or 2 C]; or None
    ends_ptr,  # int32 [E], or None: E groups of N rows each
    ids_ptr,  # int32 [N], or None
    shift_ptr,  # contiguous, [S, K], or None
    weights_ptr,  # float32 [R k], or None
    seed_ptr,  # int64 [2], or None: no dropout
    N,
    E,
    K,
    C,
    T,
    slots,  # per row of the routing
    a_group,  # strides
    a_row,
    a_depth,
    b_group,
    b_depth,
    b_column,
    out_group,
    out_row,
    out_column,
    threshold,
    scale,
    GATHERED: tl.constexpr,
    OF_SLOTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GLU: tl.constexpr,
    ROUNDED: tl.constexpr,  # to the dtype of the output, before the activation
    WHICH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    STRIP: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One program owns a tile of `out`.
    WIDTH: tl.constexpr = BLOCK_N // 2 if GLU else BLOCK_N
    HALVES: tl.constexpr = 2 if GLU else 1
    group, first, end, column, _ = tile_of_program(ends_ptr, N, E, C, BLOCK_M, WIDTH, GROUPS, STRIP)
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        inside = row < end
        live = row < tl.where(group < E, end, 0)  # behind the last group there is no matrix
        present = live
        slot = row
        source = row
        shift_rows = None
        factor = None
        if ids_ptr is not None:
            slot = tl.load(ids_ptr + row, mask=live, other=-1)
            present = slot >= 0
            if OF_SLOTS:
                live = present
            if GATHERED:
                source = slot // slots % T
            if shift_ptr is not None:
                shift_rows = shift_ptr + (slot // slots // T).to(tl.int64) * K
            if weights_ptr is not None:
                factor = tl.load(weights_ptr + slot, mask=present, other=0.0)
        lane = tl.arange(0, BLOCK_N)
        wide = column + lane % WIDTH + lane // WIDTH * C
        group_64 = group.to(tl.int64)
        dots = product_of_rows(
            a + group_64 * a_group + source.to(tl.int64) * a_row, present, shift_rows, factor,
            b + group_64 * b_group + wide.to(tl.int64) * b_column, column + lane % WIDTH < C,
            tl.where(group < E, K, 0), K, a_depth, b_depth,
            BLOCK_M, BLOCK_N, BLOCK_K, INTERPRETED, PRECISION,
        )  # fmt: skip
        bias = bias_ptr
        if bias_ptr is not None:
            bias += tl.minimum(group_64, E - 1) * (HALVES * C)
        h_rows = row.to(tl.int64)
        if ends_ptr is None:
            h_rows += group_64 * N
        h_rows *= HALVES * C
        out_rows = out + group_64 * out_group + row.to(tl.int64) * out_row
        up = dots
        if GLU:
            dots, up = halves_of(dots)
        _store(
            dots, up, out_rows, h_rows, h_ptr, bias, inside, live, slot, column,
            seed_ptr, C, out_column, threshold, scale,
            ACTIVATION, GLU, ROUNDED, WHICH, INTERPRETED,
        )  # fmt: skip


def multiply_rows(
    a: Tensor,  # [N or T, K] or [E, N, K]
    b: Tensor,  # [E, K, C or 2 C]
    out: Tensor,  # [N, C] or [E, N, C], any strides
    ends: Tensor | None,  # int32 [E]
    *,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    gather: Gather | None = None,
    activation: int = IDENTITY,
    rounded: bool = True,
    dropping: Dropout | None = None,
) -> None:
    """Write `out`, and h, [N, C or 2 C], if it is there; it is what `rounded` sums are."""
    (E, K, _), (N, C) = b.shape, out.shape[-2:]
    if out.numel() == 0:
        return
    rows = N if ends is not None else N * E
    tile, options = choose_tile(TILES, ((a, out), (b,)), rows, E, b.shape[2])
    width = tile.block_n // 2 if is_glu(activation) else tile.block_n
    row_tiles = E * triton.cdiv(N, tile.block_m)
    if ends is not None:
        row_tiles = tiles_of_rows(N, E, tile.block_m)
    ids, k, T, of_slots, reads, shift, weights = gather or Gather(None, 1, 1, False, False)
    seed, threshold, scale, which = dropping or dropout(None, 0.0, HIDDEN)
    strides = [(0, *t.stride())[-3:] for t in (a, b, out)]
    grid = (row_tiles * triton.cdiv(C, width),)
    grouped_rows_kernel[grid](
        a, b, out, h, bias, ends, ids, shift, weights, seed, N, E, K, C, T, k,
        *strides[0], *strides[1], *strides[2], threshold, scale,
        GATHERED=reads, OF_SLOTS=of_slots, ROUNDED=rounded, GROUPS=lanes_of(E), STRIP=STRIP,
        **constants_of(activation), **which, **options,
    )  # fmt: skip
