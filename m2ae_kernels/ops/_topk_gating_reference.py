"""topk_gating in plain PyTorch, forward and backward. Math: topk_gating.py

Letters: T tokens, S routings of each, R = S * T rows (row s * T + t), E experts, k per row.
"""

import math

import torch
from torch import Tensor

from m2ae_kernels.ops._plain import accumulator

SOFTMAX, SIGMOID, SQRTSOFTPLUS = range(3)
# Below it, log(softplus(z)) = z - exp(z) / 2 to the last digit of float64, where softplus(z) is on
# its way to underflow.
_FAR = -20.0


def forward(
    logits: Tensor,  # [T, E]
    logit_shift: Tensor | None,  # [S, E]
    expert_bias: Tensor | None,  # [E]
    token_mask: Tensor | None,  # [T]
    top_k: int,
    score_function: int,
    norm_topk_prob: bool,
    n_group: int,
    topk_group: int,
    group_best: int,
    routed_scaling_factor: float,
    return_entropy: bool,
    return_probs_sum: bool,
    zero_nan: bool,
) -> tuple[Tensor, ...]:
    z, present = _rows(logits, logit_shift, token_mask)
    groups = (n_group, topk_group, group_best)
    ids = _best(z.detach(), expert_bias, score_function, top_k, *groups)
    a, top, _ = _log_scores(z, score_function, zero_nan)
    p, surprise, total = _distribution(a, top)
    if norm_topk_prob:
        weights = _renormalized(_relative(a, top).gather(1, ids))
    elif score_function == SOFTMAX:
        weights = p.gather(1, ids)
    else:
        weights = a.gather(1, ids).exp()
    logsumexp = (top + total.log()).squeeze(1)
    if score_function != SOFTMAX:
        logsumexp = torch.zeros_like(logsumexp, requires_grad=False)
    kept = torch.ones_like(ids, dtype=torch.bool)
    if present is not None:
        kept = kept & present
        p = torch.where(present, p, 0)
        weights = torch.where(present, weights, 0)
        logsumexp = torch.where(present[:, 0], logsumexp, 0)
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, ids, kept)
    empty = p.new_empty(0)
    return (
        weights * routed_scaling_factor,
        torch.where(kept, ids, -1).to(torch.int32),
        logsumexp,
        (p * surprise).sum(1) if return_entropy else empty,
        p.sum(0) if return_probs_sum else empty.clone(),
        chosen.sum(0, dtype=torch.int32),
    )


def backward(
    grad_weights: Tensor | None,  # [R, k]
    grad_logsumexp: Tensor | None,  # [R]
    grad_entropy: Tensor | None,  # [R]
    grad_probs_sum: Tensor | None,  # [E]
    logits: Tensor,  # [T, E]
    logit_shift: Tensor | None,  # [S, E]
    token_mask: Tensor | None,  # [T]
    topk_ids: Tensor,  # [R, k]
    score_function: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    zero_nan: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    z, present = _rows(logits, logit_shift, token_mask)
    a, top, infinite = _log_scores(z, score_function, zero_nan)
    p, surprise, _ = _distribution(a, top)
    g = torch.zeros_like(p) if grad_probs_sum is None else grad_probs_sum.expand_as(p)
    da = torch.zeros_like(p)
    if grad_weights is not None:
        ids = topk_ids.clamp(min=0).long()
        dw = grad_weights * routed_scaling_factor  # [R, k]
        if norm_topk_prob:
            w = _renormalized(_relative(a, top).gather(1, ids))
            da = da.scatter(1, ids, w * (dw - (w * dw).sum(1, keepdim=True)))
        elif score_function == SOFTMAX:
            g = g + torch.zeros_like(p).scatter(1, ids, dw)
        else:
            da = da.scatter(1, ids, a.gather(1, ids).exp() * dw)
    da = da + p * (g - (p * g).sum(1, keepdim=True))
    if grad_entropy is not None:
        entropy = (p * surprise).sum(1, keepdim=True)
        da = da + grad_entropy[:, None] * p * (surprise - entropy)
    if grad_logsumexp is not None and score_function == SOFTMAX:
        da = da + grad_logsumexp[:, None] * p
    dz = da * _slope(z.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf), score_function)
    if not zero_nan:
        dz = torch.where(z.isnan().any(1, keepdim=True), math.nan, dz)
    dz = torch.where(infinite, 0, dz)
    if present is not None:
        dz = torch.where(present, dz, 0)
    streams = 1 if logit_shift is None else logit_shift.shape[0]
    dz = dz.view(streams, *logits.shape)  # [S, T, E]
    none = dz.new_empty(0)
    return (
        dz.sum(0).to(logits.dtype) if output_mask[0] else none.to(logits.dtype),
        none.clone()
        if logit_shift is None or not output_mask[1]
        else dz.sum(1).to(logit_shift.dtype),
    )


def _rows(
    logits: Tensor, logit_shift: Tensor | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Logits z [R, E], 0 for masked tokens, and which rows are present, [R, 1]."""
    dtype = accumulator(logits.dtype)
    z = logits.contiguous().to(dtype)[None]  # [1, T, E]; contiguous is all that follows, too
    if logit_shift is not None:
        z = z + logit_shift.to(dtype)[:, None]  # [S, T, E]
    streams = z.shape[0]
    z = z.flatten(0, 1)
    if token_mask is None:
        return z, None
    present = token_mask.repeat(streams)[:, None]
    return torch.where(present, z, 0), present


def _log_scores(z: Tensor, score_function: int, zero_nan: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-scores a [R, E], their largest [R, 1], and which rows are infinite: without gradient."""
    not_a_number = z.detach().isnan()
    if zero_nan:
        z = torch.where(not_a_number, -math.inf, z)
    else:  # a factor, because it makes the whole gradient of the row NaN, too
        z = z * torch.where(not_a_number.any(1, keepdim=True), math.nan, 1)
    highest = z.detach().amax(1, keepdim=True)
    infinite = highest == -math.inf if score_function == SIGMOID else highest.isinf()
    a = _log_score(torch.where(infinite, z.detach(), z), score_function)
    return a, a.detach().amax(1, keepdim=True), infinite


def _log_score(z: Tensor, score_function: int) -> Tensor:
    if score_function == SOFTMAX:
        return z
    if score_function == SIGMOID:
        return torch.nn.functional.logsigmoid(z)
    softplus = -torch.nn.functional.logsigmoid(-torch.where(z < _FAR, 0, z))
    far = z - z.clamp(max=_FAR).exp() / 2
    return torch.where(z < _FAR, far, softplus.log()) / 2


def _slope(z: Tensor, score_function: int) -> Tensor:
    """Derivative of the log-score. No NaN: it would outlast the 0 of a share that is 0."""
    if score_function == SOFTMAX:
        return torch.ones_like(z)
    if score_function == SIGMOID:
        return (-z).sigmoid()
    softplus = -torch.nn.functional.logsigmoid(-torch.where(z < _FAR, 0, z))
    far = 1 - z.clamp(max=_FAR).exp() / 2
    return torch.where(z < _FAR, far, z.sigmoid() / softplus) / 2


def _relative(a: Tensor, top: Tensor) -> Tensor:
    """Log-scores minus the largest; several of +inf share it, rows of -inf alone stay."""
    shared = torch.where(a == math.inf, 0, -math.inf)
    return torch.where(top == math.inf, shared, a - top.masked_fill(top.isinf(), 0))


def _distribution(a: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shares p [R, E], -log p (finite where p is 0), and the sum of exp(a - top), [R, 1]."""
    relative = _relative(a, top)
    # From the largest, and not as exp(a - logsumexp): two logits of 1e9 would weigh 1 each.
    total = _or_one(relative.exp().sum(1, keepdim=True))
    surprise = total.log() - relative.masked_fill(relative == -math.inf, 0)
    return relative.exp() / total, surprise, total


def _renormalized(a: Tensor) -> Tensor:
    """Softmax of the k log-scores of a row: relative to the largest of these, not of all."""
    top = a.detach().amax(1, keepdim=True)
    score = (a - top.masked_fill(top.isinf(), 0)).exp()
    return score / _or_one(score.sum(1, keepdim=True))


def _or_one(sum_of_weights: Tensor) -> Tensor:
    """To divide by where there may be no weight at all."""
    return torch.where(sum_of_weights == 0, 1, sum_of_weights)


def _best(
    z: Tensor,
    expert_bias: Tensor | None,
    score_function: int,
    top_k: int,
    n_group: int,
    topk_group: int,
    group_best: int,
) -> Tensor:
    """The k best experts of the topk_group best groups of each row, [R, k]."""
    of_group = of_expert = z  # orders them as the scores would, but without their rounding
    if expert_bias is not None or (n_group > 1 and group_best > 1):
        of_group = _selection_scores(z, expert_bias, score_function)
    if expert_bias is not None:
        of_expert = of_group
    # Ascending order of the negated scores puts NaN last; 0 - x is the same for both zeros.
    order = (0.0 - of_expert).argsort(dim=1, stable=True)
    if n_group > 1:
        is_out = _is_out(of_group, n_group, topk_group, group_best)
        order = order.gather(1, is_out.gather(1, order).argsort(dim=1, stable=True))
    return order[:, :top_k]


def _selection_scores(z: Tensor, expert_bias: Tensor | None, score_function: int) -> Tensor:
    """Scores, [R, E], and bias; -inf and NaN where the logit is."""
    # A NaN leaves the order of the other experts alone.
    a, top, _ = _log_scores(z, score_function, zero_nan=True)
    score = _distribution(a, top)[0] if score_function == SOFTMAX else a.exp()
    # No bias brings back an expert that was ruled out by its logit.
    score = torch.where(z == -math.inf, -math.inf, torch.where(z.isnan(), math.nan, score))
    return score if expert_bias is None else score + expert_bias


def _is_out(score: Tensor, n_group: int, topk_group: int, group_best: int) -> Tensor:
    """1 for each expert, [R, E], that is not in one of the best groups."""
    rows, E = score.shape
    groups = (rows, n_group, E // n_group)
    best = (0.0 - score.view(groups)).sort(dim=2).values.neg()
    # Experts of -inf and NaN add nothing, but to a group that has no other.
    total = torch.where(best > -math.inf, best, 0)[..., :group_best].sum(2)
    total = torch.where(best[..., 0] > -math.inf, total, best[..., 0])  # [R, n_group]
    kept = (0.0 - total).argsort(dim=1, stable=True)[:, :topk_group]
    is_out = torch.ones_like(total, dtype=torch.int32).scatter(1, kept, 0)
    return is_out[:, :, None].expand(groups).reshape(rows, E)
