"""The two ops of info_nce_loss in plain PyTorch, by a few N x M matrices. Math: info_nce_loss.py"""

import torch
from torch import Tensor

from m2ae_kernels.ops._contrastive_pairs import Pairing, entries
from m2ae_kernels.ops._contrastive_rows import inverse_norm, present_rows, unnormalize
from m2ae_kernels.ops._plain import accumulator, without_autocast


def forward(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    target: Tensor | None,  # [N]
    query_mask: Tensor | None,  # [N]
    key_mask: Tensor | None,  # [M]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    target_offset: int,
    ignore_index: int,
    same_id: int,
    exclude_self: bool,
    normalize: bool,
    eps: float,
    symmetric: bool,
    ranks: bool,
    keep: bool,
    allow_tf32: bool,
    workspace: int,
) -> tuple[Tensor, ...]:
    """Losses and statistics per row, in the order of the schema; differentiable."""
    (N, M), device, dtype = (query.shape[0], key.shape[0]), query.device, accumulator(query.dtype)
    masks = (target, query_mask, key_mask, query_ids, key_ids)
    pairing = Pairing(*masks, target_offset, ignore_index, same_id, exclude_self)
    absent, positive, at_target = entries(pairing, N, M, device)
    with without_autocast(device):
        rnorm_q = inverse_norm(query, query_mask, normalize, eps)
        rnorm_k = inverse_norm(key, key_mask, normalize, eps)
        x, y = present_rows(query, query_mask, rnorm_q), present_rows(key, key_mask, rnorm_k)
        logits = logit_scale.to(dtype) * (x @ y.mT)  # [N, M]
        wanted = torch.ones(N, dtype=torch.bool, device=device)
        if target is not None:
            wanted = target != ignore_index
        rows = _direction(logits, absent, positive, wanted)
        columns = tuple(logits.new_empty(0) for _ in rows)
        if symmetric:
            columns = _direction(logits.mT, absent.mT, positive.mT, wanted.new_ones(M))
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        ranked = (nothing, nothing.clone())
        if ranks:
            negative = logits.masked_fill(absent | positive, -torch.inf)
            in_loss = rows[3] > 0
            rank_q = _rank(negative, logits, at_target & in_loss[:, None])
            ranked = (rank_q, _rank(negative.mT, logits.mT, at_target.mT) if symmetric else nothing)
        kept = logits.detach() if keep else logits.new_empty(0)
    pairs = zip(rows, columns, strict=True)
    return *(of for pair in pairs for of in pair), rnorm_q, rnorm_k, *ranked, kept


def _direction(
    logits: Tensor, absent: Tensor, positive: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N] each
    """Of each row: loss, log sum of negatives over that of positives, the latter, their number."""
    not_negative = absent | positive
    positive = positive & wanted[:, None]
    number = positive.sum(1)
    one, in_loss = number == 1, number > 0
    if logits.shape[1] == 0:  # a sum of nothing, with a gradient
        nothing = logits.sum(1)
        return nothing, nothing - torch.inf, nothing.clone(), number.to(logits.dtype)
    log_pos = logits.masked_fill(~positive, -torch.inf).logsumexp(1)
    log_pos = torch.where(in_loss, log_pos, 0)
    neg = logits.masked_fill(not_negative, -torch.inf).logsumexp(1) - log_pos
    mean = torch.where(positive, logits, 0).sum(1) / number.clamp(min=1)
    # For one positive the last term is 0, but its gradient would round that of the first.
    loss = _log1p_exp(neg) + torch.where(one, 0, log_pos - mean)
    return torch.where(in_loss, loss, 0), neg, log_pos, number.to(logits.dtype)


def _log1p_exp(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _rank(negative: Tensor, logits: Tensor, at_target: Tensor) -> Tensor:  # [N]
    if logits.shape[1] == 0:
        return torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    best = logits.masked_fill(~at_target, -torch.inf).amax(1, keepdim=True)
    ahead = (negative > best).sum(1)
    return torch.where(at_target.any(1), ahead, logits.shape[1])


def backward(
    grad_q: Tensor,  # [N]
    grad_k: Tensor,  # [M], empty if the loss is not symmetric
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    neg_q: Tensor,
    neg_k: Tensor,
    pos_q: Tensor,
    pos_k: Tensor,
    num_q: Tensor,
    num_k: Tensor,
    rnorm_q: Tensor,
    rnorm_k: Tensor,
    kept: Tensor,
    target_offset: int,
    ignore_index: int,
    same_id: int,
    exclude_self: bool,
    normalize: bool,
    eps: float,
    symmetric: bool,
    allow_tf32: bool,
    workspace: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and logit_scale."""
    (N, M), device, dtype = (query.shape[0], key.shape[0]), query.device, accumulator(query.dtype)
    need_query, need_key, need_scale = output_mask
    masks = (target, query_mask, key_mask, query_ids, key_ids)
    pairing = Pairing(*masks, target_offset, ignore_index, same_id, exclude_self)
    absent, positive, _ = entries(pairing, N, M, device)
    with without_autocast(device):
        x, y = present_rows(query, query_mask, rnorm_q), present_rows(key, key_mask, rnorm_k)
        scale = logit_scale.to(dtype)
        logits = kept if kept.numel() > 0 else scale * (x @ y.mT)  # [N, M]
        dlogits = _dlogits(grad_q, logits, positive, neg_q, pos_q, num_q)
        if symmetric:
            columns = _dlogits(grad_k, logits.mT, positive.mT, neg_k, pos_k, num_k)
            dlogits = dlogits + columns.mT
        dlogits = dlogits.masked_fill(absent, 0)
        dx = dlogits @ y
        dscale = (x * dx).sum().to(logit_scale.dtype)
        dquery, dkey = query.new_empty(0), key.new_empty(0)
        if need_query:
            dquery = unnormalize(scale * dx, x, rnorm_q, eps, query_mask).to(query.dtype)
        if need_key:
            dy = scale * (dlogits.mT @ x)
            dkey = unnormalize(dy, y, rnorm_k, eps, key_mask).to(key.dtype)
    return dquery, dkey, dscale if need_scale else logit_scale.new_empty(0)


def _dlogits(
    grad: Tensor, logits: Tensor, positive: Tensor, neg: Tensor, log_pos: Tensor, number: Tensor
) -> Tensor:  # [N, M]
    """What the losses of the rows pass to their logits; right where a pair is not absent."""
    in_loss = number > 0
    # Where there is no loss, the sum is taken as infinite: every share in it is 0.
    log_sum = torch.where(in_loss, log_pos + _log1p_exp(neg), torch.inf)[:, None]
    of_negative = (logits - log_sum).exp()
    share = torch.where(number[:, None] == 1, 1, (logits - log_pos[:, None]).exp())
    uneven = share - 1 / number.clamp(min=1)[:, None]
    of_positive = uneven - share * neg.sigmoid()[:, None]
    of_positive = torch.where(in_loss[:, None], of_positive, 0)
    return grad[:, None] * torch.where(positive, of_positive, of_negative)
