"""Products of rows that are sorted by expert, in plain PyTorch, with shapes that no data decides.

The rows of each expert are laid out in blocks of one height, each block of one expert, and one
batched product does all blocks. With N rows, E experts and blocks of N / E rows, 2 E blocks are
enough for any distribution: at most twice the arithmetic of a loop over the experts (and not E
times that of a run of all experts), no host sync, and no reduction in a varying order; but each
block has a copy of its expert's weights, and each product of the weights' gradient is that large.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from m2ae_kernels.ops._plain import sum_by_index


class RowBlocks(NamedTuple):
    """B blocks of n entries each for N rows of E experts; all int64."""

    expert: Tensor  # [B]; -1 for a block that is not needed
    rows: Tensor  # [B, n], the row that is here; N for none
    place: Tensor  # [N], where a row is among the B n entries; B n for one of no expert


def row_blocks(expert_offsets: Tensor, N: int) -> RowBlocks:
    """The blocks for rows expert_offsets[e] to expert_offsets[e + 1], [E + 1], of N."""
    offsets = expert_offsets.long()
    E = len(offsets) - 1
    n = max(1, -(-N // E))
    B = N // n + E  # the sum over experts of ceil(rows / n) is less than N / n + E
    needed = (offsets.diff() + n - 1) // n
    first = F.pad(needed.cumsum(0), (1, 0))  # [E + 1], of each expert's blocks
    block, row = (torch.arange(size, device=offsets.device) for size in (B, N))
    expert = (block[:, None] >= first[1:]).sum(1)
    used, e = expert < E, expert.clamp(max=E - 1)
    rows = (
        offsets[e][:, None] + (block - first[e])[:, None] * n + torch.arange(n, device=row.device)
    )
    is_row = used[:, None] & (rows < offsets[e + 1][:, None])
    e_of_row = (row[:, None] >= offsets[1:]).sum(1).clamp(max=E - 1)
    within = row - offsets[e_of_row]
    place = (first[e_of_row] + within // n) * n + within % n
    return RowBlocks(
        torch.where(used, expert, -1),
        torch.where(is_row, rows, N),
        torch.where(row < offsets[E], place, B * n),
    )


def take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], where index len(rows) is a row of zeros: [*index.shape, *rows.shape[1:]].

    As an embedding, whose backward sums in a fixed order and is differentiable.
    """
    table = rows.flatten(1)
    table = torch.cat([table, table.new_zeros(1, table.shape[1])])
    return F.embedding(index, table).unflatten(-1, rows.shape[1:])


def of_experts(weights: Tensor, blocks: RowBlocks) -> Tensor:
    """The weights [E, ...] of each block's expert, [B, ...]; zeros where it has none."""
    return take(weights, torch.where(blocks.expert < 0, len(weights), blocks.expert))


def sum_by_expert(of_blocks: Tensor, blocks: RowBlocks, E: int) -> Tensor:
    """[E, ...], the sums over each expert's blocks of [B, ...]; exact zeros where it has none."""
    # The sum of all others is cut off: an index of -1 would be skipped, but has no derivative.
    index = torch.where(blocks.expert < 0, E, blocks.expert)
    return sum_by_index(of_blocks.flatten(1), index, E + 1)[:E].unflatten(1, of_blocks.shape[1:])
