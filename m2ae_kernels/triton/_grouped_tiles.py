"""Which rows and columns a program of a grouped product owns. Letters: ops/grouped_mm.py

Groups of rows lie one after the other, and what is behind the last is a group, too: its rows have
no matrix, and are written as zeros. The host knows no group's size, so programs are launched for
the most tiles that there can be; each finds its own by a cumulative sum over the groups.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from m2ae_kernels.triton import _device
from m2ae_kernels.triton._tiles import tile_at


class Tile(NamedTuple):
    """How a kernel cuts a product. To be tuned on the GPU; results differ by rounding alone."""

    block_m: int  # rows
    block_n: int  # columns
    block_k: int  # depth per step
    warps: int
    stages: int  # of the pipeline that loads depth


# By kind of product and major compute capability, 0 being the interpreter. The first tile serves
# that holds the rows of an average group, or one as high, but wider, if there are as many columns.
# None of them has been timed on a GPU: registers and shared memory chose them
# (tests/test_triton.py shows both).
Table = dict[tuple[str, int], tuple[Tile, ...]]
STRIP = 8  # row tiles that walk along the columns together, so that both panels stay in L2


def kind_of(rows: tuple[Tensor, ...], matrices: tuple[Tensor, ...]) -> str:
    """Products of float32 round to tf32 only if torch's may; odd operands do not move in 16 bytes.

    A group may begin at any row, so rows must be contiguous for that, also those of the output;
    matrices may lie either way.
    """
    x = rows[0]
    if x.element_size() == 2:
        aligned = all(t.stride(-1) == 1 for t in rows)
        for t in (*rows, *matrices):
            aligned &= t.data_ptr() % 16 == 0
            aligned &= all(step % 8 == 0 for step in t.stride() if step != 1)
        return "16-bit" if aligned else "odd 16-bit"
    return "tf32" if _device.allows_tf32(x) else "float32"


def choose_tile(
    table: Table,
    operands: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],  # with rows in groups; matrices
    rows: int,
    groups: int,
    columns: int,
) -> tuple[Tile, dict[str, Any]]:
    """The tile for these operands, this device and these sizes; the options of a launch."""
    major, kind = _device.capability(operands[0][0])[0], kind_of(*operands)
    tiles = table[kind, next(m for m in (12, 10, 9, 8, 0) if m <= major and (kind, m) in table)]
    least = next((tile for tile in tiles if tile.block_m * groups >= rows), tiles[-1])
    as_high = [tile for tile in tiles if tile.block_m == least.block_m]
    tile = next((tile for tile in reversed(as_high) if tile.block_n <= columns), as_high[0])
    return tile, {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "INTERPRETED": major == 0,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def contiguous_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def lanes_of(groups: int) -> int:
    """What a vector of all groups needs, with the rows behind the last."""
    return triton.next_power_of_2(groups + 1)


def tiles_of_rows(rows: int, groups: int, block_m: int) -> int:
    """At least as many as all groups have, with the rows behind the last: each may have a rest."""
    return rows // block_m + groups + 1


@triton.jit
def groups_of(
    ends_ptr,  # int32 [E], where each group of rows ends
    N,
    E,
    BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """First row, end and number of tiles of each group, [GROUPS]; E is behind the last."""
    group = tl.arange(0, GROUPS)
    first = tl.load(ends_ptr + group - 1, mask=(group > 0) & (group <= E), other=0)
    end = tl.load(ends_ptr + group, mask=group < E, other=N)
    # Ends that no sort returned must not lead out of the rows.
    first = tl.where(group > E, N, tl.minimum(tl.maximum(first, 0), N))
    end = tl.minimum(tl.maximum(end, first), N)
    return first, end, tl.cdiv(end - first, BLOCK_M)


@triton.jit
def group_of_tile(index, ends_ptr, N, E, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """Group, first row of the tile, end of the group's rows; no rows beyond the last tile."""
    first, end, tiles = groups_of(ends_ptr, N, E, BLOCK_M, GROUPS)
    behind = tl.cumsum(tiles, 0)
    before = behind - tiles
    it = (before <= index) & (index < behind)
    group = tl.sum(tl.where(it, tl.arange(0, GROUPS), 0), 0)
    row = tl.sum(tl.where(it, first + (index - before) * BLOCK_M, 0), 0)
    return group, row, tl.sum(tl.where(it, end, 0), 0)


@triton.jit
def rows_of_group(group, ends_ptr, N):
    """First row and end of a group that is not behind the last."""
    first = 0
    if group > 0:
        first = tl.load(ends_ptr + group - 1)
    first = tl.minimum(tl.maximum(first, 0), N)
    return first, tl.minimum(tl.load(ends_ptr + group), N)


@triton.jit
def tile_of_program(
    ends_ptr,  # int32 [E], or None: E groups of N rows each
    N,
    E,
    columns,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Group, first row, end of the rows, first column, and place in the list of row tiles."""
    per_group = tl.cdiv(N, BLOCK_M)
    row_tiles = E * per_group
    if ends_ptr is not None:
        row_tiles = N // BLOCK_M + E + 1
    tile, column_tile = tile_at(tl.program_id(0), row_tiles, tl.cdiv(columns, WIDTH), STRIP)
    if ends_ptr is not None:
        group, row, end = group_of_tile(tile, ends_ptr, N, E, BLOCK_M, GROUPS)
    else:
        group, row, end = tile // per_group, tile % per_group * BLOCK_M, N
    return group, row, end, column_tile * WIDTH, tile
