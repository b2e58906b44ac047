"""The registered ops of info_nce_loss: schemas, shapes, autograd. Contract: info_nce_loss.py

Per query (and per key, over its column; empty if not symmetric) the op returns, in float32:

    num: how many positives it has, 0 if it is not in the loss
    pos: log of the sum of exp(l) over them, 0 without any
    neg: log of the sum of exp(l) over its negatives, minus pos
    loss: log1p(exp(neg)) + pos - mean of l over the positives, 0 without any

Relative to the positives, neg is small where it matters, and loses no digits to a large l.
rank counts the negatives above the target's l. `keep` asks for N x M numbers of the kernel's own
choice, which the backward may use instead of a product. `workspace` bounds, in bytes, the
temporaries that grow with N x M. `same_id` is a value of _contrastive_pairs.SAME_ID.
"""

from typing import Any

import torch
from torch import Tensor

from m2ae_kernels._library import define
from m2ae_kernels.ops import _info_nce_loss_reference
from m2ae_kernels.ops._checks import refuse_second_derivative
from m2ae_kernels.ops._plain import accumulator

_INPUTS = (
    "Tensor query, Tensor key, Tensor logit_scale, Tensor? target, Tensor? query_mask,"
    " Tensor? key_mask, Tensor? query_ids, Tensor? key_ids"
)
_OPTIONS = (
    "SymInt target_offset, int ignore_index, int same_id, bool exclude_self, bool normalize,"
    " float eps, bool symmetric"
)
_STATISTICS = (
    "Tensor neg_q, Tensor neg_k, Tensor pos_q, Tensor pos_k, Tensor num_q, Tensor num_k,"
    " Tensor rnorm_q, Tensor rnorm_k"
)


def _fake(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
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
    N, M, dtype = query.shape[0], key.shape[0], accumulator(query.dtype)
    of_keys = M if symmetric else 0
    sizes = [N, of_keys] * 4 + ([N, M] if normalize else [0, 0])
    numbers = [query.new_empty(size, dtype=dtype) for size in sizes]
    counts = [N, of_keys] if ranks else [0, 0]
    numbers += [query.new_empty(size, dtype=torch.int64) for size in counts]
    return *numbers, query.new_empty((N, M) if keep else 0, dtype=dtype)


def _fake_backward(
    grad_q: Tensor, grad_k: Tensor, query: Tensor, key: Tensor, logit_scale: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    inputs = zip((query, key, logit_scale), rest[-1], strict=True)
    return tuple(x.new_empty(x.shape if need else 0) for x, need in inputs)


define(
    f"info_nce_loss({_INPUTS}, {_OPTIONS}, bool ranks, bool keep, bool allow_tf32,"
    f" SymInt workspace) -> (Tensor loss_q, Tensor loss_k, {_STATISTICS}, Tensor rank_q,"
    " Tensor rank_k, Tensor kept)",
    reference=_info_nce_loss_reference.forward,
    fake=_fake,
)
define(
    f"info_nce_loss_backward(Tensor grad_q, Tensor grad_k, {_INPUTS}, {_STATISTICS},"
    f" Tensor kept, {_OPTIONS}, bool allow_tf32, SymInt workspace, bool[3] output_mask)"
    " -> (Tensor dquery, Tensor dkey, Tensor dscale)",
    reference=_info_nce_loss_reference.backward,
    fake=_fake_backward,
)
call = torch.ops.m2ae_kernels.info_nce_loss.default


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = inputs[:8], inputs[8:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # zeros for `kept` would be N x M
    ctx.save_for_backward(*tensors, *output[2:10], output[12])
    ctx.options = (*options[:7], *options[9:])  # all but ranks and keep


def _backward(
    ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    needed, saved = ctx.needs_input_grad[:3], ctx.saved_tensors
    of_rows = (
        torch.zeros_like(neg) if grad is None else grad
        for grad, neg in zip((grad_q, grad_k), saved[8:10], strict=True)
    )
    grads = torch.ops.m2ae_kernels.info_nce_loss_backward(
        *of_rows, *saved, *ctx.options, list(needed)
    )
    grads = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return *grads, *(None,) * 16


torch.library.register_autograd(
    "m2ae_kernels::info_nce_loss", _backward, setup_context=_setup_context
)
refuse_second_derivative("info_nce_loss")
