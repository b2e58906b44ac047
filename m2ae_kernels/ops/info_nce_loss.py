r"""info_nce_loss: the contrastive loss of N queries against M keys, both ways, nothing N x M saved.

Math. x_i and y_j are the rows of query and key (divided by max(|.|, eps) if normalize), s the
scale, l_ij = s x_i . y_j. Query i has its positive in column t(i); P_j are the queries whose
positive is key j, k_j of them. The positive is kept out of the sums, so that what a nearly
converged pair has left to lose is not rounded away against a softmax of almost 1:

    R_i = sum of exp(l_ij) over keys j != t(i)
    C_j = sum of exp(l_ij) over queries i not in P_j
    S_j = sum of exp(l_ij) over queries i in P_j, one term if k_j = 1

    loss_q[i] = -log softmax_j(l_ij) at t(i)       = log1p(R_i / exp(l_it))
    loss_k[j] = mean over i in P_j of -log softmax_i(l_ij)
              = log1p(C_j / S_j) + log S_j - mean over i in P_j of l_ij  (k_j = 1: the log1p alone)

With w = d loss_q, v = d loss_k, W_i = R_i + exp(l_it), V_j = C_j + S_j, and t = t(i):

    dl_ij = w_i exp(l_ij) / W_i + v_j exp(l_ij) / V_j                                 for j != t
    dl_it = -w_i R_i / W_i - v_t ((1 / k_t - r) + r C_t / V_t),   r = exp(l_it) / S_t
    dx = s dl y    dy = s dl^T x    ds = sum_i x_i . (dl y)_i

and through the division by |.|: (dx - x (x . dx)) / |.|. Sums are kept as their logarithms.

Kernels: none yet; the reference serves every device, with a few N x M matrices in each direction.
Used by: van den Oord et al. 2018, "Representation learning with contrastive predictive coding";
with both directions and a learned scale Radford et al. 2021, "CLIP".
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m2ae_kernels._library import define
from m2ae_kernels.ops._checks import expect_dtype, refuse_second_derivative
from m2ae_kernels.ops._info_nce_loss_arguments import expect_supported, info_nce_loss_of
from m2ae_kernels.ops._info_nce_loss_pairs import not_negative, pairs, positives
from m2ae_kernels.ops._info_nce_loss_rows import inverse_norm, present_rows, unnormalize
from m2ae_kernels.ops._plain import accumulator, sum_by_index, without_autocast

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    logit_bias: float | Tensor | None = None,
    target: Tensor | None = None,
    target_offset: int = 0,
    ignore_index: int = -100,
    symmetric: bool = True,
    normalize: bool = False,
    eps: float = 1e-12,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "negative",
    exclude_self: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    return_metrics: bool = False,
    allow_tf32: bool | None = None,
    max_workspace_bytes: int | None = None,
) -> Any:
    """Cross entropy of each query's positive among all keys, and of each key's among all queries.

    Args:
        query: anchors, [N, D]; float32, bfloat16 or float16.
        key: candidates, [M, D], in the dtype of `query`. Keys that are nobody's positive are
            further negatives.
        logit_scale: factor on the similarities, already exponentiated: a number, or a tensor of
            one element on the device of `query`, which is read there and gets its gradient.
        logit_bias: a number, or a tensor of one element. It cancels: the loss does not depend on
            it, and its gradient is 0.
        target: key of each query's positive, [N] int64 in [0, M), or `ignore_index`. Several
            queries may share a key. None is arange(N) + target_offset.
        target_offset: without a target, the key of the first query's positive.
        ignore_index: a query with this target has no loss, but is a negative for the keys.
        symmetric: True is (query to key + key to query) / 2, False is query to key alone.
        normalize: divide each row by its norm first.
        eps: smallest norm to divide by, > 0; as in torch.nn.functional.normalize.
        query_mask: [N] bool; a row with False is absent: neither anchor nor negative. It may hold
            NaN, and its gradient is 0.
        key_mask: [M] bool; the same for keys. A query whose positive is absent has no loss.
        query_ids: group of each query; not supported yet.
        key_ids: group of each key; not supported yet.
        same_id: what pairs of one group are; not supported yet but for "negative".
        exclude_self: query and key are one set; not supported yet.
        label_smoothing: not supported yet.
        weight: of each pair; not supported yet.
        reduction: "mean" over the queries that have a positive, and over the keys that are one;
            "sum"; or "none".
        return_metrics: ranks and logits beside the loss; not supported yet.
        allow_tf32: products of float32 follow torch.backends.cuda.matmul; not supported yet.
        max_workspace_bytes: not supported yet.

    Returns:
        The loss, a float32 scalar; 0 if there is no pair. With reduction="none" the pair
        (loss_q [N], loss_k [M]), where a row without a positive has loss 0; loss_k is None without
        symmetric. Differentiable once with respect to query, key and logit_scale.

    A single pair has loss 0 exactly. A key with k > 1 queries weighs each of them by 1/k. A row
    that holds NaN, and is present, spreads it as in PyTorch. A row of norm 0 stays 0 under
    normalize, and its gradient is divided by eps.

    Precision: dot products, sums and the loss are float32 for every dtype, with log1p, so that a
    loss of 1e-20 still has its leading digits; gradients are rounded to the dtype of their input.
    Under autocast query and key are rounded to the autocast dtype, the scale is not.

    Raises:
        ValueError: a shape does not fit; on the CPU, an element of `target` is out of range (on a
            GPU such a query has no loss); eps or reduction is not as above.
        TypeError: a dtype or a device is not as above.
        NotImplementedError: an argument that is not supported yet.
    """
    not_yet = (query_ids, key_ids, same_id, exclude_self, label_smoothing, weight)
    expect_supported(*not_yet, return_metrics, allow_tf32, max_workspace_bytes)
    for name, features in {"query": query, "key": key}.items():
        cure = "; m2ae_kernels.reference.info_nce_loss takes float64"
        expect_dtype("info_nce_loss", name, features, FLOATING, cure)
    pairing = (target, target_offset, ignore_index, query_mask, key_mask)
    options = (*pairing, normalize, eps, symmetric, logit_bias, reduction)
    return info_nce_loss_of(_op, query, key, logit_scale, *options)


def reference(
    query: Tensor,
    key: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    logit_bias: float | Tensor | None = None,
    target: Tensor | None = None,
    target_offset: int = 0,
    ignore_index: int = -100,
    symmetric: bool = True,
    normalize: bool = False,
    eps: float = 1e-12,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "negative",
    exclude_self: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    return_metrics: bool = False,
    allow_tf32: bool | None = None,
    max_workspace_bytes: int | None = None,
) -> Any:
    """What info_nce_loss means, in plain PyTorch, differentiable; float64 computes in float64."""
    not_yet = (query_ids, key_ids, same_id, exclude_self, label_smoothing, weight)
    expect_supported(*not_yet, return_metrics, allow_tf32, max_workspace_bytes)
    pairing = (target, target_offset, ignore_index, query_mask, key_mask)
    options = (*pairing, normalize, eps, symmetric, logit_bias, reduction)
    return info_nce_loss_of(_reference, query, key, logit_scale, *options)


def _reference(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    target: Tensor | None,  # [N]
    target_offset: int,
    ignore_index: int,
    query_mask: Tensor | None,  # [N]
    key_mask: Tensor | None,  # [M]
    normalize: bool,
    eps: float,
    symmetric: bool,
) -> tuple[Tensor, ...]:
    (N, M), device, dtype = (query.shape[0], key.shape[0]), query.device, accumulator(query.dtype)
    column, paired = pairs(N, M, device, target, target_offset, ignore_index, query_mask, key_mask)
    if N == 0 or M == 0:
        zero = query[:0].sum() + key[:0].sum() + logit_scale.reshape(1)[:0].sum()  # with a gradient
        sizes = _sizes(N, M, normalize, symmetric)
        return tuple(zero.to(dtype).expand(size).clone() for size in sizes)
    with without_autocast(device):
        rnorm_q = inverse_norm(query, query_mask, normalize, eps)
        rnorm_k = inverse_norm(key, key_mask, normalize, eps)
        x, y = present_rows(query, query_mask, rnorm_q), present_rows(key, key_mask, rnorm_k)
        scale = logit_scale.to(dtype)
        pos = scale * (x * F.embedding(column, y)).sum(1)
        left_out = not_negative(column, paired, query_mask, key_mask, M)
        logits = (scale * (x @ y.mT)).masked_fill(left_out, -torch.inf)  # [N, M]
        neg_q = logits.logsumexp(1)
        loss_q = torch.where(paired, _log1p_exp(neg_q - pos), 0)
        loss_k, neg_k = pos.new_empty(0), pos.new_empty(0)
        if symmetric:
            neg_k = logits.logsumexp(0)
            log_sum, mean, count = positives(pos, column, paired, M)
            loss_k = _log1p_exp(neg_k - log_sum) + (log_sum - mean)
            loss_k = torch.where(count > 0, loss_k, 0)
    return loss_q, loss_k, neg_q, neg_k, pos, rnorm_q, rnorm_k


def _log1p_exp(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _sizes(N: int, M: int, normalize: bool, symmetric: bool) -> tuple[int, ...]:
    """Those of loss_q, loss_k, neg_q, neg_k, pos, rnorm_q and rnorm_k; 0 if not asked for."""
    of_keys = M if symmetric else 0
    return N, of_keys, N, of_keys, N, *((N, M) if normalize else (0, 0))


def _fake(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    target: Tensor | None,
    target_offset: int,
    ignore_index: int,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    normalize: bool,
    eps: float,
    symmetric: bool,
) -> tuple[Tensor, ...]:
    sizes = _sizes(query.shape[0], key.shape[0], normalize, symmetric)
    return tuple(query.new_empty(size, dtype=accumulator(query.dtype)) for size in sizes)


def _backward_reference(
    grad_q: Tensor,  # [N]
    grad_k: Tensor,  # [M], empty if the loss is not symmetric
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    neg_q: Tensor,
    neg_k: Tensor,
    pos: Tensor,
    rnorm_q: Tensor,
    rnorm_k: Tensor,
    target_offset: int,
    ignore_index: int,
    eps: float,
    symmetric: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    (N, M), device, dtype = (query.shape[0], key.shape[0]), query.device, accumulator(query.dtype)
    if N == 0 or M == 0:
        inputs = zip((query, key, logit_scale), output_mask, strict=True)
        dquery, dkey, dscale = (
            torch.zeros_like(x) if need else x.new_empty(0) for x, need in inputs
        )
        return dquery, dkey, dscale
    need_query, need_key, need_scale = output_mask
    column, paired = pairs(N, M, device, target, target_offset, ignore_index, query_mask, key_mask)
    with without_autocast(device):
        x, y = present_rows(query, query_mask, rnorm_q), present_rows(key, key_mask, rnorm_k)
        scale = logit_scale.to(dtype)
        logits = scale * (x @ y.mT)  # [N, M]
        # Where there is no positive, the sum is taken as infinite: every share in it is 0.
        log_w = torch.where(paired, torch.logaddexp(pos, neg_q), torch.inf)
        dlogits = grad_q[:, None] * (logits - log_w[:, None]).exp()
        dpos = grad_q * (neg_q - log_w).exp()
        if symmetric:
            log_sum, _, count = positives(pos, column, paired, M)
            log_v = torch.where(count > 0, torch.logaddexp(log_sum, neg_k), torch.inf)
            dlogits = dlogits + grad_k * (logits - log_v).exp()
            share = (pos - log_sum[column]).exp()
            uneven = 1 / count.clamp(min=1)[column] - share
            dpos = dpos + grad_k[column] * (uneven + share * (neg_k - log_v).exp()[column])
        dlogits = dlogits.masked_fill(not_negative(column, paired, query_mask, key_mask, M), 0)
        dpos = torch.where(paired, -dpos, 0)[:, None]  # [N, 1]
        dx = dlogits @ y + dpos * y[column]
        dscale = (x * dx).sum().to(logit_scale.dtype)
        dquery, dkey = query.new_empty(0), key.new_empty(0)
        if need_query:
            dquery = unnormalize(scale * dx, x, rnorm_q, eps, query_mask).to(query.dtype)
        if need_key:
            dy = dlogits.mT @ x + sum_by_index(dpos * x, column, M)
            dkey = unnormalize(scale * dy, y, rnorm_k, eps, key_mask).to(key.dtype)
    return dquery, dkey, dscale if need_scale else logit_scale.new_empty(0)


def _backward_fake(
    grad_q: Tensor,
    grad_k: Tensor,
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    inputs = zip((query, key, logit_scale), rest[-1], strict=True)
    return tuple(x.new_empty(x.shape if need else 0) for x, need in inputs)


define(
    "info_nce_loss(Tensor query, Tensor key, Tensor logit_scale, Tensor? target,"
    " SymInt target_offset, int ignore_index, Tensor? query_mask, Tensor? key_mask, bool normalize,"
    " float eps, bool symmetric) -> (Tensor loss_q, Tensor loss_k, Tensor neg_q, Tensor neg_k,"
    " Tensor pos, Tensor rnorm_q, Tensor rnorm_k)",
    reference=_reference,
    fake=_fake,
)
define(
    "info_nce_loss_backward(Tensor grad_q, Tensor grad_k, Tensor query, Tensor key,"
    " Tensor logit_scale, Tensor? target, Tensor? query_mask, Tensor? key_mask, Tensor neg_q,"
    " Tensor neg_k, Tensor pos, Tensor rnorm_q, Tensor rnorm_k, SymInt target_offset,"
    " int ignore_index, float eps, bool symmetric, bool[3] output_mask)"
    " -> (Tensor dquery, Tensor dkey, Tensor dscale)",
    reference=_backward_reference,
    fake=_backward_fake,
)
_op = torch.ops.m2ae_kernels.info_nce_loss.default


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, logit_scale, target, offset, ignore_index, query_mask, key_mask = inputs[:8]
    statistics = output[2:]
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(query, key, logit_scale, target, query_mask, key_mask, *statistics)
    ctx.options = (offset, ignore_index, *inputs[9:])  # eps, symmetric


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    grads = torch.ops.m2ae_kernels.info_nce_loss_backward(
        grad_q, grad_k, *ctx.saved_tensors, *ctx.options, list(needed)
    )
    grads = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return *grads, *(None,) * 8


torch.library.register_autograd(
    "m2ae_kernels::info_nce_loss", _backward, setup_context=_setup_context
)
refuse_second_derivative("info_nce_loss")
