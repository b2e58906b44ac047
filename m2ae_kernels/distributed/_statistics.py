"""Statistics of rows, or columns, of which each part of the matrix knows its own share."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """What the op tells per row (_info_nce_loss_op.py); float32."""

    neg: Tensor  # [N] log of the sum of exp(l) over the negatives, minus pos
    pos: Tensor  # [N] log of the sum of exp(l) over the positives, 0 without any
    num: Tensor  # [N] how many positives, 0 if the row is not in the loss
    excess: Tensor  # [N] pos minus the mean of l over the positives, exactly 0 for one

    def loss(self) -> Tensor:  # [N]
        """Mean over the positives of the cross entropy; 0 for rows that are not in the loss."""
        return torch.where(self.num > 0, _log1p_exp(self.neg) + self.excess, 0)


def statistics(loss: Tensor, neg: Tensor, pos: Tensor, num: Tensor) -> Statistics:
    """From the outputs of the op."""
    return Statistics(neg, pos, num, torch.where(num > 1, loss - _log1p_exp(neg), 0))


def merged(
    part: Statistics,
    maximum: Callable[[Tensor], Tensor],
    total: Callable[[Tensor], Tensor],
) -> Statistics:
    """The statistics of rows over all parts of the matrix, from those over each.

    `maximum` and `total` reduce over the parts; they keep the first of their dimensions. Sums are
    taken relative to the largest positive, so that a row with one positive, all of whose negatives
    are far below it, keeps the digits of what little they sum up to.
    """
    has = part.num > 0
    top_pos, top_neg = maximum(
        torch.stack([torch.where(has, part.pos, -torch.inf), part.pos + part.neg])
    )
    top_pos = torch.where(top_pos == -torch.inf, 0, top_pos)
    reference = torch.where(top_neg == -torch.inf, 0, top_neg - top_pos)
    above = part.pos - top_pos
    sum_pos, sum_neg, num, sum_logits = total(
        torch.stack(
            [
                torch.where(has, above.exp(), 0),
                (part.neg + above - reference).exp(),
                part.num,
                torch.where(has, part.num * (above - part.excess), 0),
            ]
        )
    )
    in_loss = num > 0
    log_pos = torch.where(in_loss, sum_pos.log(), 0)  # 0 for one positive
    excess = torch.where(num > 1, log_pos - sum_logits / num.clamp(min=1), 0)
    pos = torch.where(in_loss, top_pos + log_pos, 0)
    return Statistics(reference + sum_neg.log() - log_pos, pos, num, excess)


def merged_pair(first: Statistics, second: Statistics) -> Statistics:
    """The statistics over two parts."""
    pair = Statistics(*(torch.stack(both) for both in zip(first, second, strict=True)))
    return merged(pair, lambda of: of.amax(1), lambda of: of.sum(1))


def _log1p_exp(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))
