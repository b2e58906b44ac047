"""Products over the rows of each group, in Triton: gradients of the matrices of a grouped product.

One program owns a tile of one group's result and walks through all rows of that group, so that
sums have one order, and a group without rows gets exact zeros.
"""

import triton
import triton.language as tl
from torch import Tensor

from m2ae_kernels.triton._grouped_rows import Gather
from m2ae_kernels.triton._grouped_tiles import Table, Tile, choose_tile, rows_of_group
from m2ae_kernels.triton._numbers import float32_of, rounded_to

TILES: Table = {
    ("16-bit", 0): (Tile(64, 64, 32, 4, 1),),
    ("16-bit", 8): (Tile(128, 128, 64, 8, 3),),
    ("16-bit", 9): (Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3)),
    ("16-bit", 12): (Tile(128, 64, 64, 8, 2),),
    ("odd 16-bit", 0): (Tile(64, 64, 32, 4, 1),),
    ("odd 16-bit", 8): (Tile(64, 64, 32, 8, 2),),
    ("odd 16-bit", 10): (Tile(64, 64, 32, 4, 2),),
    ("tf32", 8): (Tile(64, 64, 32, 4, 3),),
    ("float32", 0): (Tile(64, 64, 32, 4, 1),),
    ("float32", 8): (Tile(64, 64, 16, 8, 2),),
}


@triton.jit(do_not_specialize=["N", "T"])
def grouped_depth_kernel(
    a,  # [N, M] or [E, N, M]
    b,  # rows [N, C], or [T, C] of which `ids` tells; or [E, N, C]
    out,  # [E, M, C]
    ends_ptr,  # int32 [E], or None: E groups of N rows each
    ids_ptr,  # int32 [N], or None
    shift_ptr,  # contiguous, [S, C], or None
    weights_ptr,  # float32 [R k], or None
    N,
    M,
    C,
    T,
    slots,  # per row of the routing
    a_group,  # strides
    a_row,
    a_column,
    b_group,
    b_row,
    b_column,
    out_group,
    out_row,
    out_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # rows per step
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One program owns a tile of one group's matrix.
    column_tiles = tl.cdiv(C, BLOCK_N)
    per_group = tl.cdiv(M, BLOCK_M) * column_tiles
    group = tl.program_id(0) // per_group
    tile = tl.program_id(0) % per_group
    m = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    group_64 = group.to(tl.int64)
    first = 0
    end = N
    if ends_ptr is not None:
        first, end = rows_of_group(group, ends_ptr, N)
    a_columns = a + group_64 * a_group + m.to(tl.int64) * a_column
    b_columns = b + group_64 * b_group + c.to(tl.int64) * b_column
    dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for row0 in range(first, end, BLOCK_K):
        row = row0 + tl.arange(0, BLOCK_K)
        inside = row < end
        at_a = a_columns[None, :] + (row.to(tl.int64) * a_row)[:, None]
        of_a = tl.load(at_a, mask=inside[:, None] & (m < M)[None, :], other=0.0)
        present = inside
        source = row
        if ids_ptr is not None:
            slot = tl.load(ids_ptr + row, mask=inside, other=-1)
            present = slot >= 0
            source = slot // slots % T
        at_b = b_columns[None, :] + (source.to(tl.int64) * b_row)[:, None]
        mask = present[:, None] & (c < C)[None, :]
        of_b = tl.load(at_b, mask=mask, other=0.0)
        if shift_ptr is not None or weights_ptr is not None:
            dtype: tl.constexpr = of_b.dtype
            of_b = float32_of(of_b, INTERPRETED)
            if shift_ptr is not None:
                stream = (slot // slots // T).to(tl.int64)
                at_shift = shift_ptr + (stream * C)[:, None] + c[None, :]
                of_b += float32_of(tl.load(at_shift, mask=mask, other=0.0), INTERPRETED)
            if weights_ptr is not None:
                of_b *= tl.load(weights_ptr + slot, mask=present, other=0.0)[:, None]
            of_b = rounded_to(of_b, dtype, INTERPRETED)
        if INTERPRETED:
            of_a = float32_of(of_a, True)
            of_b = float32_of(of_b, True)
        dots = tl.dot(tl.trans(of_a), of_b, dots, input_precision=PRECISION)
    at_out = out + group_64 * out_group + (m.to(tl.int64) * out_row)[:, None]
    at_out += (c.to(tl.int64) * out_column)[None, :]
    dots = rounded_to(dots, out.dtype.element_ty, INTERPRETED)
    tl.store(at_out, dots, mask=(m < M)[:, None] & (c < C)[None, :])


def multiply_depth(
    a: Tensor,  # [N, M] or [E, N, M]
    b: Tensor,  # [N or T, C] or [E, N, C]
    out: Tensor,  # [E, M, C], any strides
    ends: Tensor | None,  # int32 [E]
    gather: Gather | None = None,
) -> None:
    """Write `out`."""
    (E, M, C), N = out.shape, a.shape[-2]
    if out.numel() == 0:
        return
    tile, options = choose_tile(TILES, ((a, b), (out,)), M, 1, C)
    ids, k, T, _, _, shift, weights = gather or Gather(None, 1, 1)
    strides = [(0, *t.stride())[-3:] for t in (a, b, out)]
    grid = (E * triton.cdiv(M, tile.block_m) * triton.cdiv(C, tile.block_n),)
    grouped_depth_kernel[grid](
        a, b, out, ends, ids, shift, weights, N, M, C, T, k,
        *strides[0], *strides[1], *strides[2], **options,
    )  # fmt: skip
