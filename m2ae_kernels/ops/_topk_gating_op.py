"""The registered ops of topk_gating: schemas, shapes, autograd. Contract: topk_gating.py

score_function is a value of _topk_gating_reference.py. n_group is 1 where groups limit nothing.
group_best: the score of a group is the sum of its so many best experts. Outputs that are not asked
for, and gradients that are not needed, are empty.
"""

from typing import Any

import torch
from torch import Tensor

from m2ae_kernels._library import define
from m2ae_kernels.ops import _topk_gating_reference
from m2ae_kernels.ops._checks import refuse_second_derivative
from m2ae_kernels.ops._plain import accumulator


def _fake(
    logits: Tensor,
    logit_shift: Tensor | None,
    expert_bias: Tensor | None,
    token_mask: Tensor | None,
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
    T, E = logits.shape
    R = T if logit_shift is None else logit_shift.shape[0] * T
    real = logits.new_empty(0, dtype=accumulator(logits.dtype))
    return (
        real.new_empty(R, top_k),
        real.new_empty(R, top_k, dtype=torch.int32),
        real.new_empty(R),
        real.new_empty(R if return_entropy else 0),
        real.new_empty(E if return_probs_sum else 0),
        real.new_empty(E, dtype=torch.int32),
    )


def _backward_fake(
    grad_weights: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    grad_probs_sum: Tensor | None,
    logits: Tensor,
    logit_shift: Tensor | None,
    token_mask: Tensor | None,
    topk_ids: Tensor,
    score_function: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    zero_nan: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    of_logits = logits.new_empty(logits.shape if output_mask[0] else 0)
    if logit_shift is None or not output_mask[1]:
        return of_logits, logits.new_empty(0, dtype=accumulator(logits.dtype))
    return of_logits, logit_shift.new_empty(logit_shift.shape)


define(
    "topk_gating(Tensor logits, Tensor? logit_shift, Tensor? expert_bias, Tensor? token_mask,"
    " int top_k, int score_function, bool norm_topk_prob, int n_group, int topk_group,"
    " int group_best, float routed_scaling_factor, bool return_entropy, bool return_probs_sum,"
    " bool zero_nan) -> (Tensor topk_weights, Tensor topk_ids, Tensor logsumexp, Tensor entropy,"
    " Tensor probs_sum, Tensor tokens_per_expert)",
    reference=_topk_gating_reference.forward,
    fake=_fake,
)
define(
    "topk_gating_backward(Tensor? grad_weights, Tensor? grad_logsumexp, Tensor? grad_entropy,"
    " Tensor? grad_probs_sum, Tensor logits, Tensor? logit_shift, Tensor? token_mask,"
    " Tensor topk_ids, int score_function, bool norm_topk_prob, float routed_scaling_factor,"
    " bool zero_nan, bool[2] output_mask) -> (Tensor grad_logits, Tensor grad_shift)",
    reference=_topk_gating_reference.backward,
    fake=_backward_fake,
)
_op = torch.ops.m2ae_kernels.topk_gating.default
_backward_op = torch.ops.m2ae_kernels.topk_gating_backward.default


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, logit_shift, _, token_mask, _, score_function, norm_topk_prob = inputs[:7]
    factor, return_entropy, return_probs_sum, zero_nan = inputs[10:]
    _, topk_ids, logsumexp, entropy, probs_sum, tokens_per_expert = output
    constant = [topk_ids, tokens_per_expert]
    constant += [] if score_function == _topk_gating_reference.SOFTMAX else [logsumexp]
    constant += [] if return_entropy else [entropy]
    constant += [] if return_probs_sum else [probs_sum]
    ctx.mark_non_differentiable(*constant)
    ctx.set_materialize_grads(False)  # an output that is not in the loss costs nothing
    ctx.save_for_backward(logits, logit_shift, token_mask, topk_ids)
    ctx.options = (score_function, norm_topk_prob, factor, zero_nan)


_NO_GRADIENTS = (None,) * 12  # of the arguments behind logits and logit_shift


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
    needed = list(ctx.needs_input_grad[:2])
    given = (*grads, *ctx.saved_tensors, *ctx.options, needed)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        of_logits, of_shift = _backward_op(*given)  # which refuses to be differentiated
    else:
        with torch._C._AutoDispatchBelowAutograd():
            of_logits, of_shift = _backward_op(*given)
    return of_logits if needed[0] else None, of_shift if needed[1] else None, *_NO_GRADIENTS


class _Call(torch.autograd.Function):
    """The registered op and its registered backward, by the shorter way."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output: tuple[Tensor, ...] = _op(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


def call(*inputs: Any) -> tuple[Tensor, ...]:
    """The registered op, in eager mode with a gradient by way of _Call.

    register_autograd makes a Python copy of the schema in every call: of 110 us, forward and
    backward at T = 16, E = 8, one AMD EPYC (Zen 5) core, torch 2.13, that is 45. Its kernels are in
    Python too, and stand between a call and the op even where nothing is to be differentiated: that
    is 5 us of each, so _Call and the backward go below them.
    """
    logits, logit_shift = inputs[:2]
    needs_grad = torch.is_grad_enabled() and (
        logits.requires_grad or (logit_shift is not None and logit_shift.requires_grad)
    )
    output: tuple[Tensor, ...]
    if needs_grad and not torch.compiler.is_compiling():
        output = _Call.apply(*inputs)  # type: ignore[no-untyped-call]
    else:
        output = _op(*inputs)
    return output


torch.library.register_autograd(
    "m2ae_kernels::topk_gating", _backward, setup_context=_setup_context
)
refuse_second_derivative("topk_gating")
