"""From the losses of the rows to the loss: smoothing, weights and reduction, in plain PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m2ae_kernels.ops._contrastive_pairs import SAME_ID, Pairing, targets
from m2ae_kernels.ops._contrastive_rows import inverse_norm, present_rows
from m2ae_kernels.ops._plain import sum_by_index, without_autocast


class ContrastiveMetrics(NamedTuple):
    """What one pass over the logits tells beside the loss; no gradients.

    In-batch recall at k is (rank_q < k).float().mean(), over the queries that are in the loss.
    """

    rank_q: Tensor  # [N] int64, keys that a query prefers to its target; M if it is not in the loss
    rank_k: Tensor | None  # [M] int64, queries that a key prefers to its own; N if it has none
    lse_q: Tensor  # [N] float32, log of the sum of exp(logit) over the keys
    lse_k: Tensor | None  # [M] float32, over the queries; None, as rank_k, without symmetric
    pos: Tensor  # [N] float32, the positive's logit (of several, log of the sum of exp), or 0


def metrics_of(outputs: tuple[Tensor, ...], symmetric: bool) -> ContrastiveMetrics:
    """From the outputs of the op."""
    outputs = tuple(output.detach() for output in outputs)
    _, _, neg_q, neg_k, pos_q, pos_k, num_q, num_k, _, _, rank_q, rank_k, _ = outputs
    lse_q, lse_k = _lse(neg_q, pos_q, num_q), _lse(neg_k, pos_k, num_k)
    return ContrastiveMetrics(
        rank_q, rank_k if symmetric else None, lse_q, lse_k if symmetric else None, pos_q
    )


def _lse(neg: Tensor, pos: Tensor, number: Tensor) -> Tensor:
    return torch.where(number > 0, pos + torch.logaddexp(neg, torch.zeros_like(neg)), neg)


def smoothing(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    pairing: Pairing,
    normalize: bool,
    eps: float,
    label_smoothing: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor | None]:  # [N], [M]
    """What label_smoothing adds to the losses: the mean positive logit minus the mean logit.

    Of a row both means are products with a mean of the other side's rows, so nothing is N x M.
    """
    with without_autocast(query.device):
        x, y = (
            present_rows(rows, mask, inverse_norm(rows, mask, normalize, eps))
            for rows, mask in ((query, pairing.query_mask), (key, pairing.key_mask))
        )
        factor = label_smoothing * logit_scale.to(x.dtype)
        of_key = _means(y, pairing, x.shape[0], y.shape[0], of_queries=False)
        added_q = factor * (x * (of_key[0] - of_key[1])).sum(1)
        if not symmetric:
            return added_q, None
        of_query = _means(x, pairing, x.shape[0], y.shape[0], of_queries=True)
        return added_q, factor * (y * (of_query[0] - of_query[1])).sum(1)


def weights_of_keys(weight: Tensor, pairing: Pairing, M: int) -> Tensor:  # [M]
    """Of a key: the mean weight of the queries it is a positive of."""
    N = weight.shape[0]
    return _means(weight[:, None], pairing, N, M, of_queries=True)[0][:, 0]


def _means(
    features: Tensor, pairing: Pairing, N: int, M: int, *, of_queries: bool
) -> tuple[Tensor, Tensor]:  # [M, D] each if of_queries, else [N, D]
    """Means over the positives, and over all that is not absent, of the queries, or of the keys.

    Over sets that differ from one row to the next by the pairs of an id, the target and the query
    itself, each of which is a row or a sum by index; a last column of ones counts along.
    """
    device = features.device
    column, paired = targets(pairing, N, M, device)
    mask, others = (pairing.query_mask, M) if of_queries else (pairing.key_mask, N)
    rows = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    if mask is not None:
        rows = torch.where(mask[:, None], rows, 0)
    itself = torch.arange(others, device=device)
    itself = itself - pairing.target_offset if of_queries else itself + pairing.target_offset
    has_itself = torch.zeros(others, dtype=torch.bool, device=device)
    if pairing.exclude_self:
        has_itself = (itself >= 0) & (itself < rows.shape[0])
    itself = torch.where(has_itself, itself, 0)
    matches = torch.zeros(N, dtype=torch.bool, device=device)  # a query and its target are of an id
    of_id, itself_of_id = torch.zeros_like(rows[:1]), torch.zeros_like(has_itself)
    if pairing.same_id != SAME_ID["negative"]:
        assert pairing.query_ids is not None
        assert pairing.key_ids is not None
        ids = (
            (pairing.query_ids, pairing.key_ids)
            if of_queries
            else (pairing.key_ids, pairing.query_ids)
        )
        of_id = _sum_by_id(rows, *ids)
        itself_of_id = has_itself & (ids[0][itself] == ids[1])
        matches = pairing.query_ids == pairing.key_ids[column]
    if of_queries:

        def at_target(where: Tensor) -> Tensor:
            return sum_by_index(torch.where((paired & where)[:, None], rows, 0), column, M)
    else:

        def at_target(where: Tensor) -> Tensor:
            return torch.where((paired & where)[:, None], F.embedding(column, rows), 0)

    excluded = torch.where(has_itself[:, None], F.embedding(itself, rows), 0)
    excluded_of_id = torch.where(itself_of_id[:, None], excluded, 0)
    valid = rows.sum(0) - excluded
    positive = at_target(torch.ones_like(matches))
    if pairing.same_id == SAME_ID["ignore"]:
        valid = valid - (of_id - excluded_of_id) + at_target(matches)
    if pairing.same_id == SAME_ID["positive"]:
        positive = of_id - excluded_of_id + at_target(~matches)
    return _mean(positive), _mean(valid)


def _mean(sums: Tensor) -> Tensor:
    return sums[:, :-1] / sums[:, -1:].clamp(min=1)


def _sum_by_id(rows: Tensor, ids: Tensor, others: Tensor) -> Tensor:  # [len(others), D]
    """For each of `others` the sum of the rows whose id is the same.

    An id is told by the first place it would have among the sorted ones: no shape depends on data.
    """
    if len(ids) == 0:
        return rows.new_zeros(len(others), rows.shape[1])
    ordered = ids.sort().values
    sums = sum_by_index(rows, torch.searchsorted(ordered, ids), len(ids))
    place = torch.searchsorted(ordered, others).clamp(max=len(ids) - 1)
    return torch.where((ordered[place] == others)[:, None], F.embedding(place, sums), 0)


def reduce(loss: Tensor, number: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Sum or mean over the rows that are in the loss, [] float32; or [N]."""
    if weight is not None:
        loss = loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    in_loss = number > 0
    if weight is None:
        return loss.sum() / in_loss.sum().clamp(min=1)
    total = torch.where(in_loss, weight, 0).sum()
    return loss.sum() / torch.where(total != 0, total, 1)
