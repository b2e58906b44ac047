"""Tiles of an N x M matrix of similarities, for the contrastive losses: which, and what they hold.

A tile is BLOCK_M rows of x times BLOCK_N rows of y, summed in float32. Programs are persistent:
each takes every NUM_PROGRAMS-th tile. A table of tiles lives at the head of each op's file.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from m2ae_kernels.triton import _device
from m2ae_kernels.triton._numbers import float32_of


class Tile(NamedTuple):
    """How a kernel cuts the matrix. To be tuned on the GPU; results differ by rounding alone."""

    block_m: int  # rows of x
    block_n: int  # rows of y
    block_k: int  # features per step
    warps: int
    stages: int  # of the pipeline that loads features
    group: int = 8  # row tiles that walk along y together, so that both panels stay in L2
    per_sm: int = 1  # programs per multiprocessor
    flatten: bool = True  # one loop over tiles and steps: loads for a tile precede the last's end


class Launch(NamedTuple):
    """The arguments that all kernels over tiles share."""

    x: Any  # [N, D], tensor or descriptor
    y: Any  # [M, D]
    programs: int
    block_m: int
    block_n: int
    constants: dict[str, Any]

    def output(self, matrix: Tensor) -> Tensor | TensorDescriptor:
        """`matrix`, [rows, columns], as a kernel stores half tiles of it."""
        if not self.constants["BY_DESCRIPTOR"]:
            return matrix
        return TensorDescriptor.from_tensor(matrix, [self.block_m, self.block_n // 2])

    def grid(self, rows: int, columns: int) -> tuple[int]:
        """One program per tile, or as many as run at once."""
        tiles = triton.cdiv(rows, self.block_m) * triton.cdiv(columns, self.block_n)
        return (min(tiles, self.programs),)


def launch(
    tiles: dict[tuple[str, int], Tile], x: Tensor, y: Tensor, allow_tf32: bool
) -> tuple[Tile, Launch]:
    """The tile for these features and this device, and how to launch a kernel over it."""
    major, programs = _device.capability(x)
    aligned = _has_aligned_rows(x) and _has_aligned_rows(y)
    kind = "tf32" if allow_tf32 else "float32"
    if x.element_size() == 2:
        kind = "16-bit" if aligned else "odd 16-bit"
    tile = tiles[kind, next(m for m in (12, 10, 9, 8, 0) if m <= major and (kind, m) in tiles)]
    by_descriptor = aligned and major != 8 and kind != "float32"
    constants: dict[str, Any] = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP": tile.group,
        "FLATTEN": tile.flatten,
        "BY_DESCRIPTOR": by_descriptor,
        "INTERPRETED": major == 0,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    inputs: list[Any] = [x, y]
    if by_descriptor:
        inputs = [
            TensorDescriptor.from_tensor(rows, [block, tile.block_k])
            for rows, block in ((x, tile.block_m), (y, tile.block_n))
        ]
    x_tiles, y_tiles = inputs
    programs *= tile.per_sm
    return tile, Launch(x_tiles, y_tiles, programs, tile.block_m, tile.block_n, constants)


def is_diagonal(
    target: Tensor | None, query_mask: Tensor | None, key_mask: Tensor | None, same_id: int
) -> bool:
    """Whether all entries are negative, but those on a diagonal."""
    return target is None and query_mask is None and key_mask is None and same_id == 0


def _has_aligned_rows(rows: Tensor) -> bool:
    """Whether the hardware copies tiles of the contiguous `rows` on its own, from 9.0 on."""
    aligned = rows.data_ptr() % 16 == 0 and rows.stride(0) * rows.element_size() % 16 == 0
    return aligned and rows.numel() > 0


@triton.jit
def tile_at(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Which tile the index-th is: GROUP row tiles high strips, each walked column by column."""
    per_strip = GROUP * column_tiles
    first = index // per_strip * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = index % per_strip
    return first + within % height, within // height


@triton.jit
def product(
    x,  # [N, D], pointer or descriptor
    y,  # [M, D]
    i0,  # first row of the tile
    j0,
    row_end,  # rows from here on are not read; descriptors stop at N
    column_end,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x[i0:] @ y[j0:].T, [BLOCK_M, BLOCK_N] in float32."""
    dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    i = i0 + tl.arange(0, BLOCK_M)
    j = j0 + tl.arange(0, BLOCK_N)
    for k0 in range(0, D, BLOCK_K):
        if BY_DESCRIPTOR:
            a = x.load([i0, k0])
            b = y.load([j0, k0])
        else:
            k = k0 + tl.arange(0, BLOCK_K)
            at_x = i.to(tl.int64)[:, None] * D + k[None, :]
            at_y = j.to(tl.int64)[:, None] * D + k[None, :]
            a = tl.load(x + at_x, mask=(i < row_end)[:, None] & (k < D)[None, :], other=0.0)
            b = tl.load(y + at_y, mask=(j < column_end)[:, None] & (k < D)[None, :], other=0.0)
        if INTERPRETED:
            a = float32_of(a, True)
            b = float32_of(b, True)
        dots = tl.dot(a, b.T, dots, input_precision=PRECISION)
    return dots


@triton.jit
def halves_of(dots):
    """The left and the right half of a tile, so that what follows takes half of the registers."""
    dots = tl.reshape(dots, (dots.shape[0], 2, dots.shape[1] // 2))
    return tl.split(tl.permute(dots, (0, 2, 1)))


@triton.jit
def entries(
    i,  # [BLOCK_M]
    j,  # [BLOCK_N]
    column,  # [BLOCK_M], each row's target, -1 without one, -2 if the row is absent
    key_mask_ptr,  # [M] or None
    query_ids_ptr,  # [N] or None
    key_ids_ptr,  # [M]
    M,
    offset,
    SAME_ID: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
):
    """Which entries of the tile are positive, and which negative, [BLOCK_M, BLOCK_N]."""
    in_range = j < M
    if key_mask_ptr is not None:
        in_range = in_range & (tl.load(key_mask_ptr + j, mask=in_range, other=0) != 0)
    present = (column > -2)[:, None] & in_range[None, :]
    if EXCLUDE_SELF:
        itself = i.to(tl.int64) + offset
        present = present & (itself[:, None] != j[None, :])
    positive = present & (column[:, None] == j[None, :])
    negative = present & (column[:, None] != j[None, :])
    if SAME_ID != 0:
        query_ids = tl.load(query_ids_ptr + i, mask=column > -2, other=0)
        key_ids = tl.load(key_ids_ptr + j, mask=in_range, other=0)
        same = query_ids[:, None] == key_ids[None, :]
        if SAME_ID == 2:
            positive = positive | (negative & same)
        negative = negative & (same == 0)
    return positive, negative


@triton.jit
def sum_over_tiles(parts_ptr, tiles, width, lane, in_range, total, TILES: tl.constexpr):
    """`total` plus the sum of parts, [tiles, width], over the tiles, in their order."""
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & in_range[None, :]
        at = parts_ptr + tile.to(tl.int64)[:, None] * width + lane[None, :]
        total += tl.sum(tl.load(at, mask=inside, other=0.0), axis=0)
    return total
