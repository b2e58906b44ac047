"""Which pairs of info_nce_loss are positive, which negative, and sums over the positive ones."""

import torch
from torch import Tensor

from m2ae_kernels.ops._plain import sum_by_index


def pairs(
    N: int,
    M: int,
    device: torch.device,
    target: Tensor | None,
    target_offset: int,
    ignore_index: int,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The key of each query's positive, [N] int64 in [0, M), and whether it has one, [N] bool."""
    if target is None:
        column = torch.arange(N, device=device) + target_offset
        paired = torch.ones(N, dtype=torch.bool, device=device)
    else:
        paired = target != ignore_index
        _check_range(target, paired, M)
        paired = paired & (target >= 0) & (target < M)
        column = torch.where(paired, target, 0)
    if query_mask is not None:
        paired = paired & query_mask
    if key_mask is not None and M > 0:
        paired = paired & key_mask[column]
    return column, paired


def _check_range(target: Tensor, counts: Tensor, M: int) -> None:
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = counts & ((target < 0) | (target >= M))
    if wrong.any():
        raise ValueError(
            f"info_nce_loss: expected target in [0, M = {M}) or ignore_index, got"
            f" {int(target[wrong][0])}"
        )


def not_negative(
    column: Tensor,  # [N]
    paired: Tensor,  # [N]
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    M: int,
) -> Tensor:  # bool [N, M]
    """Which entries are of a positive pair, or of an absent row."""
    left_out = torch.where(paired, column, -1)[:, None] == torch.arange(M, device=column.device)
    if query_mask is not None:
        left_out = left_out | ~query_mask[:, None]
    if key_mask is not None:
        left_out = left_out | ~key_mask
    return left_out


def positives(
    pos: Tensor, column: Tensor, paired: Tensor, M: int
) -> tuple[Tensor, Tensor, Tensor]:  # [M] each
    """Of the queries whose positive is key j: log S_j, the mean of their logits, their number."""
    shown = torch.where(paired, pos.detach(), -torch.inf)
    top = shown.new_full((M,), -torch.inf).scatter_reduce(0, column, shown, "amax")
    share = torch.where(paired, pos - top[column], 0).exp() * paired
    terms = torch.stack([share, torch.where(paired, pos, 0), paired.to(pos.dtype)], dim=1)
    total, logits, count = sum_by_index(terms, column, M).unbind(1)
    log_sum = torch.where(count > 0, total, 1).log() + torch.where(count > 0, top, 0)
    return log_sum, logits / count.clamp(min=1), count


def anchors(
    N: int,
    M: int,
    device: torch.device,
    target: Tensor | None,
    target_offset: int,
    ignore_index: int,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[int | Tensor, int | Tensor]:
    """How many queries, and how many keys, have a positive; 1 if none has."""
    if target is None and query_mask is None and key_mask is None:
        return max(N, 1), max(N, 1)
    column, paired = pairs(N, M, device, target, target_offset, ignore_index, query_mask, key_mask)
    hit = torch.zeros(M + 1, dtype=torch.bool, device=device)  # the last one: no pair
    hit = hit.scatter(0, torch.where(paired, column, M), True)
    return paired.sum().clamp(min=1), hit[:M].sum().clamp(min=1)
