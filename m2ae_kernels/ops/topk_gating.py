r"""topk_gating: route each token to its k best experts, and what the balance losses need to know.

Math, for one token with logits z of length E, the softmax p over all of them, and S the indices of
its k largest logits, with c = routed_scaling_factor:

    lse = log sum_i exp(z_i)     p_i = exp(z_i - lse)     H = -sum_i p_i log p_i
    w_j = c p_j,  or  c p_j / sum_{i in S} p_i if norm_topk_prob,  for j in S

P [E] is the sum of p over tokens. Backward, with dp_j = c dw_j for j in S, or, if norm_topk_prob,
(c dw_j - sum_{i in S} dw_i w_i) / sum_{i in S} p_i:

    g_i  = dp_i [i in S] + dP_i
    dz_i = p_i (g_i - sum_j p_j g_j) + dlse p_i - dH p_i (log p_i + H)

Which experts are chosen is piecewise constant: no gradient of that.

Kernels: none yet; the reference serves every device.
Papers: Shazeer et al. 2017, "Outrageously large neural networks", eq. 3-5; Fedus et al. 2021,
"Switch transformers", for the balance loss that P and the counts make; Zoph et al. 2022, "ST-MoE",
for the loss on lse.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from m2ae_kernels._library import define
from m2ae_kernels.ops._checks import expect_dtype, refuse_second_derivative
from m2ae_kernels.ops._plain import accumulator
from m2ae_kernels.ops._topk_gating_arguments import check_topk_gating

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


class TopkGatingOutput(NamedTuple):
    """What topk_gating returns, for T tokens, E experts, k of them per token."""

    topk_weights: Tensor  # [T, k] float32
    topk_ids: Tensor  # [T, k] int32
    logsumexp: Tensor  # [T] float32
    entropy: Tensor | None  # [T] float32
    probs_sum: Tensor | None  # [E] float32
    tokens_per_expert: Tensor  # [E] int32


def topk_gating(
    logits: Tensor,
    top_k: int,
    *,
    score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax",
    norm_topk_prob: bool = False,
    expert_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: Literal["max", "top2_sum"] | int = "top2_sum",
    routed_scaling_factor: float = 1.0,
    logit_shift: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_entropy: bool = False,
    return_probs_sum: bool = False,
    nan_policy: Literal["propagate", "zero"] = "propagate",
) -> TopkGatingOutput:
    """Softmax over all experts, then the k largest of it: their weights and which they are.

    Args:
        logits: router scores, [..., E]; float32, bfloat16 or float16. T is the product of the
            leading axes. E <= 1024.
        top_k: experts per token, 1 <= k <= E.
        score_function: "softmax"; "sigmoid" and "sqrtsoftplus" are not supported yet.
        norm_topk_prob: divide the k weights by their sum.
        expert_bias: not supported yet.
        n_group: not supported yet but for 1.
        topk_group: not supported yet but for 1.
        group_score: not supported yet but for its default.
        routed_scaling_factor: factor on the weights.
        logit_shift: not supported yet.
        token_mask: bool, [T], or of the leading axes of `logits`; a token with False is not routed
            and may hold NaN.
        return_entropy: fill `entropy`.
        return_probs_sum: fill `probs_sum`.
        nan_policy: what a NaN among the logits of a token does. "propagate": the token's weights,
            logsumexp and entropy, and probs_sum, are NaN, so that the loss is seen to be bad;
            "zero": it counts as -inf.

    Returns:
        TopkGatingOutput of
        topk_weights: [T, k] float32, in descending order. Differentiable.
        topk_ids: [T, k] int32, distinct; -1 where `token_mask` is False. Equal logits go to the
            lowest index first, where -0 equals 0; then come those of -inf, then those of NaN.
        logsumexp: [T] float32; 0 where masked. Differentiable.
        entropy: [T] float32, in nats, of the softmax over all E; 0 where masked. Differentiable.
        probs_sum: [E] float32, sum over unmasked tokens of that softmax. Differentiable.
        tokens_per_expert: [E] int32, how often each expert is among the k of an unmasked token.

    An expert of logit -inf weighs exactly 0, and so do all of a token that has no other. Several
    +inf share the weight of 1 equally (torch.softmax gives NaN). A token whose largest logit is
    infinite has logsumexp of that value and passes no gradient. With k = 1 and norm_topk_prob the
    weight is 1 and has no gradient, by design.

    Precision: float32 from the logits on, for every dtype, also under autocast; gradients are
    rounded to the dtype of the logits. Differentiable once. For float64, see
    m2ae_kernels.reference.topk_gating.

    Raises:
        ValueError: k or E is out of range, or a shape does not fit.
        TypeError: a dtype or a device is not as above.
        NotImplementedError: an argument that is not supported yet.
    """
    cure = "; m2ae_kernels.reference.topk_gating takes float64"
    expect_dtype("topk_gating", "logits", logits, FLOATING, cure)
    not_yet = (expert_bias, n_group, topk_group, group_score, logit_shift)
    options = (norm_topk_prob, routed_scaling_factor, return_entropy, return_probs_sum, nan_policy)
    return _gate(_op, logits, top_k, token_mask, score_function, not_yet, options)


def reference(
    logits: Tensor,
    top_k: int,
    *,
    score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax",
    norm_topk_prob: bool = False,
    expert_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: Literal["max", "top2_sum"] | int = "top2_sum",
    routed_scaling_factor: float = 1.0,
    logit_shift: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_entropy: bool = False,
    return_probs_sum: bool = False,
    nan_policy: Literal["propagate", "zero"] = "propagate",
) -> TopkGatingOutput:
    """What topk_gating means, in plain PyTorch, differentiable; float64 computes in float64."""
    not_yet = (expert_bias, n_group, topk_group, group_score, logit_shift)
    options = (norm_topk_prob, routed_scaling_factor, return_entropy, return_probs_sum, nan_policy)
    return _gate(_reference, logits, top_k, token_mask, score_function, not_yet, options)


def _gate(
    op: Callable[..., tuple[Tensor, ...]],
    logits: Tensor,
    top_k: int,
    token_mask: Tensor | None,
    score_function: str,
    not_yet: tuple[object, ...],
    options: tuple[bool, float, bool, bool, str],
) -> TopkGatingOutput:
    """Check the arguments, flatten the tokens, and name what `op` returns."""
    norm_topk_prob, factor, return_entropy, return_probs_sum, nan_policy = options
    check_topk_gating(logits, top_k, token_mask, score_function, not_yet, nan_policy)
    rows = logits.flatten(0, -2) if logits.dim() > 1 else logits[None]  # [T, E]
    mask = None if token_mask is None else token_mask.flatten()  # [T]
    asked = (return_entropy, return_probs_sum)
    weights, ids, logsumexp, entropy, probs_sum, tokens_per_expert = op(
        rows, top_k, mask, norm_topk_prob, factor, *asked, nan_policy == "zero"
    )
    return TopkGatingOutput(
        weights,
        ids,
        logsumexp,
        entropy if return_entropy else None,
        probs_sum if return_probs_sum else None,
        tokens_per_expert,
    )


def _reference(
    logits: Tensor,  # [T, E]
    top_k: int,
    token_mask: Tensor | None,  # [T]
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    return_entropy: bool,
    return_probs_sum: bool,
    zero_nan: bool,
) -> tuple[Tensor, ...]:
    logits = logits.contiguous()  # and with it all that follows
    # Ascending order of the negated logits puts NaN last; 0 - z is the same for both zeros.
    order = (0.0 - logits.detach().to(accumulator(logits.dtype))).argsort(dim=1, stable=True)
    ids = order[:, :top_k]
    p, surprise, logsumexp, _ = _softmax(logits, token_mask, zero_nan)
    kept = torch.ones_like(ids, dtype=torch.bool)
    if token_mask is not None:
        kept = kept & token_mask[:, None]
        p = torch.where(token_mask[:, None], p, 0)
        logsumexp = torch.where(token_mask, logsumexp, 0)
    weights = p.gather(1, ids)
    if norm_topk_prob:
        weights = weights / _or_one(weights.sum(1, keepdim=True))
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


def _softmax(
    logits: Tensor, token_mask: Tensor | None, zero_nan: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax p [T, E] and -log p, logsumexp [T], the largest logit [T, 1].

    Where p is 0, -log p is given as some finite number. A masked token counts as all zeros.
    """
    z = logits.to(accumulator(logits.dtype))
    if token_mask is not None:
        z = torch.where(token_mask[:, None], z, 0)
    if zero_nan:
        z = torch.where(z.isnan(), -torch.inf, z)
    top = z.detach().amax(1, keepdim=True)
    z = torch.where(top == torch.inf, torch.where(z == torch.inf, 0, -torch.inf), z)
    z = z - top.masked_fill(top.isinf(), 0)
    # From the largest logit, and not as exp(z - logsumexp): two of 1e9 would weigh 1 each.
    total = _or_one(z.exp().sum(1, keepdim=True))
    surprise = total.log() - z.masked_fill(z == -torch.inf, 0)
    return z.exp() / total, surprise, (top + total.log()).squeeze(1), top


def _or_one(sum_of_weights: Tensor) -> Tensor:
    """To divide by where there may be no weight at all."""
    return torch.where(sum_of_weights == 0, 1, sum_of_weights)


def _fake(
    logits: Tensor,
    top_k: int,
    token_mask: Tensor | None,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    return_entropy: bool,
    return_probs_sum: bool,
    zero_nan: bool,
) -> tuple[Tensor, ...]:
    T, E = logits.shape
    real = logits.new_empty(0, dtype=accumulator(logits.dtype))
    return (
        real.new_empty(T, top_k),
        real.new_empty(T, top_k, dtype=torch.int32),
        real.new_empty(T),
        real.new_empty(T if return_entropy else 0),
        real.new_empty(E if return_probs_sum else 0),
        real.new_empty(E, dtype=torch.int32),
    )


def _backward_reference(
    grad_weights: Tensor | None,  # [T, k]
    grad_logsumexp: Tensor | None,  # [T]
    grad_entropy: Tensor | None,  # [T]
    grad_probs_sum: Tensor | None,  # [E]
    logits: Tensor,
    topk_ids: Tensor,
    token_mask: Tensor | None,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    zero_nan: bool,
) -> Tensor:
    p, surprise, _, top = _softmax(logits.contiguous(), token_mask, zero_nan)  # [T, E]
    g = torch.zeros_like(p)
    if grad_weights is not None:
        ids = topk_ids.clamp(min=0).long()
        dp = grad_weights * routed_scaling_factor  # [T, k]
        if norm_topk_prob:
            chosen = p.gather(1, ids)
            total = _or_one(chosen.sum(1, keepdim=True))
            dp = (dp - (dp * chosen / total).sum(1, keepdim=True)) / total
        g = g.scatter(1, ids, dp)
    if grad_probs_sum is not None:
        g = g + grad_probs_sum
    grad = p * (g - (p * g).sum(1, keepdim=True))
    if grad_logsumexp is not None:
        grad = grad + grad_logsumexp[:, None] * p
    if grad_entropy is not None:
        entropy = (p * surprise).sum(1, keepdim=True)
        grad = grad + grad_entropy[:, None] * p * (surprise - entropy)
    passes = ~top.isinf() if token_mask is None else ~top.isinf() & token_mask[:, None]
    return torch.where(passes, grad, 0).to(logits.dtype)


def _backward_fake(
    grad_weights: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_probs_sum: Tensor | None,
    logits: Tensor,
    topk_ids: Tensor,
    token_mask: Tensor | None,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    zero_nan: bool,
) -> Tensor:
    return logits.new_empty(logits.shape)


define(
    "topk_gating(Tensor logits, int top_k, Tensor? token_mask, bool norm_topk_prob,"
    " float routed_scaling_factor, bool return_entropy, bool return_probs_sum, bool zero_nan)"
    " -> (Tensor topk_weights, Tensor topk_ids, Tensor logsumexp, Tensor entropy,"
    " Tensor probs_sum, Tensor tokens_per_expert)",
    reference=_reference,
    fake=_fake,
)
define(
    "topk_gating_backward(Tensor? grad_weights, Tensor? grad_logsumexp, Tensor? grad_entropy,"
    " Tensor? grad_probs_sum, Tensor logits, Tensor topk_ids, Tensor? token_mask,"
    " bool norm_topk_prob, float routed_scaling_factor, bool zero_nan) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
)
_op = torch.ops.m2ae_kernels.topk_gating.default


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, token_mask, norm_topk_prob, factor, return_entropy, return_probs_sum, zero_nan = (
        inputs
    )
    _, topk_ids, _, entropy, probs_sum, tokens_per_expert = output
    not_asked = [] if return_entropy else [entropy]
    not_asked += [] if return_probs_sum else [probs_sum]
    ctx.mark_non_differentiable(topk_ids, tokens_per_expert, *not_asked)
    ctx.set_materialize_grads(False)  # an output that is not in the loss costs nothing
    ctx.save_for_backward(logits, topk_ids, token_mask)
    ctx.options = (norm_topk_prob, factor, zero_nan)


def _backward(
    ctx: Any,
    grad_weights: Tensor | None,
    _ids: None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_probs_sum: Tensor | None,
    _count: None,
) -> tuple[Tensor | None, ...]:
    grads = (grad_weights, grad_logsumexp, grad_entropy, grad_probs_sum)
    grad = torch.ops.m2ae_kernels.topk_gating_backward(*grads, *ctx.saved_tensors, *ctx.options)
    return grad, *(None,) * 7


torch.library.register_autograd(
    "m2ae_kernels::topk_gating", _backward, setup_context=_setup_context
)
refuse_second_derivative("topk_gating")
