r"""topk_gating: route each token to its k best experts, and what the balance losses need to know.

Math, for one token with logits z of length E. Each expert has a log-score a, and all together the
distribution p, its normalized form:

    softmax:       a_i = z_i                        sigmoid: a_i = -softplus(-z_i)
    sqrtsoftplus:  a_i = log(softplus(z_i)) / 2

    p_i = exp(a_i) / sum_j exp(a_j)     lse = log sum_i exp(z_i)     H = -sum_i p_i log p_i

S are the k experts with the largest z, or with expert_bias b the largest exp(a_i) + b_i (softmax:
p_i + b_i), in the groups whose best such numbers have the largest sums. Their weights, with
c = routed_scaling_factor:

    w_j = c exp(a_j) (softmax: c p_j),  or  c exp(a_j) / sum_{i in S} exp(a_i) if norm_topk_prob

P [E] is the sum of p over rows. Backward, with g_i = dP_i, and for softmax without norm_topk_prob
g_i = dP_i + c dw_i [i in S]:

    da_i = p_i (g_i - sum_j p_j g_j) + dlse p_i - dH p_i (log p_i + H)
         + [i in S] w_i (dw_i - sum_{j in S} dw_j w_j / c)   if norm_topk_prob
         + [i in S] w_i dw_i                                 if not, nor softmax
    dz_i = da_i a'(z_i),  a' = 1, sigmoid(-z), sigmoid(z) / (2 softplus(z))

Which experts are chosen is piecewise constant: no gradient of that.

The op: _topk_gating_op.py, its reference _topk_gating_reference.py. Kernels:
csrc/cpu/topk_gating.cpp; csrc/cuda/topk_gating.cu, topk_gating_backward.cu.
Papers: Shazeer et al. 2017, "Outrageously large neural networks", eq. 3-5; Fedus et al. 2021,
"Switch transformers", for the balance loss that P and the counts make; Zoph et al. 2022, "ST-MoE",
for the loss on lse; DeepSeek-AI 2024, "DeepSeek-V3", for sigmoid scores, groups and expert_bias.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from m2ae_kernels.ops import _topk_gating_op, _topk_gating_reference
from m2ae_kernels.ops._checks import expect_dtype, refuse_forward_mode
from m2ae_kernels.ops._topk_gating_arguments import topk_gating_of

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


class TopkGatingOutput(NamedTuple):
    """What topk_gating returns, for R rows (each of T tokens S times), E experts, k per row."""

    topk_weights: Tensor  # [R, k] float32
    topk_ids: Tensor  # [R, k] int32
    logsumexp: Tensor  # [R] float32
    entropy: Tensor | None  # [R] float32
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
    """The k best experts of each token, their weights, and statistics of all experts.

    Args:
        logits: router scores, [..., E]; float32, bfloat16 or float16. T is the product of the
            leading axes. E <= 1024.
        top_k: experts per token, 1 <= k <= E.
        score_function: "softmax" over all E; "sigmoid" or "sqrtsoftplus", the square root of
            softplus, of each logit alone.
        norm_topk_prob: divide the k weights by their sum, however small that is.
        expert_bias: [E] float32, added to the scores to choose by; not in the weights, and without
            gradient.
        n_group: the experts are so many groups of equal size, side by side.
        topk_group: how many groups a token chooses from; k <= topk_group * E / n_group.
        group_score: by what groups are chosen: "max", their best expert; "top2_sum", the sum of
            their two best; or the sum of their n best, an int.
        routed_scaling_factor: factor on the weights.
        logit_shift: [S, E] float32, bfloat16 or float16: route each token S times, by
            logits + logit_shift[s]. R = S * T rows, row s * T + t; without it R = T.
        token_mask: bool, [T], or of the leading axes of `logits`; a token with False is not routed
            and may hold NaN.
        return_entropy: fill `entropy`.
        return_probs_sum: fill `probs_sum`.
        nan_policy: what a NaN among the logits of a row does. "propagate": the row's weights,
            logsumexp and entropy, and probs_sum, are NaN, so that the loss is seen to be bad;
            "zero": it counts as -inf.

    Returns:
        TopkGatingOutput of
        topk_weights: [R, k] float32, in the order of topk_ids. Differentiable.
        topk_ids: [R, k] int32, distinct, the best first; -1 where `token_mask` is False. Equal
            experts go to the lowest index first, where -0 equals 0, and equal groups to the lowest
            group; then come experts of logit -inf, then those of NaN.
        logsumexp: [R] float32, of the logits; 0 where masked. Differentiable. Zeros, without
            gradient, unless score_function is "softmax".
        entropy: [R] float32, in nats, of the scores of all E divided by their sum; 0 where masked.
            Differentiable.
        probs_sum: [E] float32, sum over unmasked rows of those. Differentiable.
        tokens_per_expert: [E] int32, how often each expert is among the k of an unmasked row.

    Experts are compared by their logits, exactly; with expert_bias by score + bias in float32. An
    expert of logit -inf weighs exactly 0, and so do all of a row that has no other; no bias lets it
    pass a finite one. An expert with NaN in expert_bias ranks with those of NaN. In the score of a
    group experts of -inf and NaN count for nothing, unless it has no other. Several +inf share p
    equally (torch.softmax gives NaN). A row whose largest score is infinite, or that has logits of
    -inf alone, has logsumexp of its largest logit and passes no gradient. With k = 1 and
    norm_topk_prob the weight is 1 and has no gradient, by design.

    Precision: float32 from the logits on, for every dtype, also under autocast; gradients are
    rounded to the dtype of their input. Results repeat bit for bit on one device, for any number of
    threads. Differentiable once, by logits and logit_shift. For float64, see
    m2ae_kernels.reference.topk_gating.

    Raises:
        ValueError: k, E or the groups are out of range, or a shape or a name does not fit.
        TypeError: a dtype or a device is not as above.
    """
    cure = "; m2ae_kernels.reference.topk_gating takes float64"
    expect_dtype("topk_gating", "logits", logits, FLOATING, cure)
    refuse_forward_mode("topk_gating", logits, logit_shift)
    scoring = (score_function, norm_topk_prob, expert_bias)
    groups = (n_group, topk_group, group_score)
    rows = (routed_scaling_factor, logit_shift, token_mask)
    given = (*scoring, *groups, *rows, return_entropy, return_probs_sum, nan_policy)
    return TopkGatingOutput(*topk_gating_of(_topk_gating_op.call, logits, top_k, *given))


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
    scoring = (score_function, norm_topk_prob, expert_bias)
    groups = (n_group, topk_group, group_score)
    rows = (routed_scaling_factor, logit_shift, token_mask)
    given = (*scoring, *groups, *rows, return_entropy, return_probs_sum, nan_policy)
    return TopkGatingOutput(*topk_gating_of(_topk_gating_reference.forward, logits, top_k, *given))
