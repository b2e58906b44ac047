"""The registered ops of expert_mlp: schemas, shapes, autograd. Contract: expert_mlp.py

With `saves`, expert_mlp returns what its backward needs beside its inputs: h [N, H or 2 H], and y
[N, Do] if there is an output activation; both before the activation, in the dtype of x, 0 in rows
without a slot. Otherwise, and for gradients that output_mask does not ask for, an output is empty.
Backwards compute an empty h again; saves_h() says when it is to be. y they cannot do without.
Activations are their places in _activations.ACTIVATIONS; weight_at is AT_OUTPUT, AT_INPUT or
NOWHERE of _expert_mlp_reference.py.
"""

from typing import Any

import torch
from torch import Tensor

from m2ae_kernels._library import define
from m2ae_kernels.ops import _expert_mlp_reference
from m2ae_kernels.ops._activations import IDENTITY
from m2ae_kernels.ops._checks import refuse_second_derivative

_INPUTS = (
    "Tensor x, Tensor w1, Tensor w2, Tensor topk_weights, Tensor? b1, Tensor? b2, Tensor? shift,"
    " Tensor? seed, Tensor sorted_ids, Tensor inverse_ids, Tensor expert_offsets"
)
_OPTIONS = (
    "int activation, int output_activation, float dropout_p, float output_dropout_p, int weight_at"
)
_DIFFERENTIABLE = 7  # the first of the inputs

# A larger h is computed again by the backward on the CPU: 5 percent of a forward and backward for
# what is two thirds of its peak memory, 33 MB of 49 at T = 1,024, D = 512, H = 2,048, k = 4 in
# float32 (AMD EPYC, Zen 5, 1 thread, 2026-11).
LARGEST_SAVED_H = 16 << 20  # bytes


def saves_h(x: Tensor, w1: Tensor, rows: int, output_activation: int) -> bool:
    """Whether a forward that a backward follows keeps h, of so many rows."""
    if x.device.type != "cpu" or output_activation != IDENTITY:
        return True
    return rows * w1.shape[1] * x.element_size() <= LARGEST_SAVED_H


def _fake(x: Tensor, w1: Tensor, w2: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sorted_ids, inverse_ids, output_activation, saves = rest[5], rest[6], rest[9], rest[13]
    N = len(sorted_ids) if saves else 0
    saves_y = saves and output_activation != IDENTITY
    return (
        x.new_empty(len(inverse_ids), w2.shape[1]),
        x.new_empty(N, w1.shape[1]) if saves else x.new_empty(0),
        x.new_empty(N, w2.shape[1]) if saves_y else x.new_empty(0),
    )


def _fake_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else grad.new_empty(0)
        for tensor, need in zip(rest[:_DIFFERENTIABLE], rest[-1], strict=True)
    )


define(
    f"expert_mlp({_INPUTS}, {_OPTIONS}, bool saves) -> (Tensor out, Tensor h, Tensor y)",
    reference=_expert_mlp_reference.forward,
    fake=_fake,
)
define(
    f"expert_mlp_backward(Tensor grad, {_INPUTS}, Tensor h, Tensor y, {_OPTIONS},"
    f" bool[{_DIFFERENTIABLE}] output_mask) -> (Tensor grad_x, Tensor grad_w1, Tensor grad_w2,"
    " Tensor grad_topk_weights, Tensor grad_b1, Tensor grad_b2, Tensor grad_shift)",
    reference=_expert_mlp_reference.backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, h, y = output
    ctx.mark_non_differentiable(h, y)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:11], h, y)
    ctx.options = inputs[11:16]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 17
    needed = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    grads = torch.ops.m2ae_kernels.expert_mlp_backward(
        grad, *ctx.saved_tensors, *ctx.options, needed
    )
    grads = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return *grads, *(None,) * 10


torch.library.register_autograd("m2ae_kernels::expert_mlp", _backward, setup_context=_setup_context)
refuse_second_derivative("expert_mlp")
registered = torch.ops.m2ae_kernels.expert_mlp.default
