"""The registered ops of grouped_mm: schemas, shapes, autograd. Contract: grouped_mm.py

With `saves`, h is the product with its bias, before the activation; otherwise, and for gradients
that output_mask does not ask for, an output is empty. `activation` is its place in
_activations.ACTIVATIONS.
"""

from typing import Any

import torch
from torch import Tensor

from m2ae_kernels._library import define
from m2ae_kernels.ops import _grouped_mm_reference
from m2ae_kernels.ops._activations import is_glu
from m2ae_kernels.ops._checks import refuse_second_derivative

_INPUTS = "Tensor mat_a, Tensor mat_b, Tensor? offs, Tensor? bias, Tensor? a_ids"


def _fake(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None,
    a_ids: Tensor | None,
    activation: int,
    out_dtype: torch.dtype,
    saves: bool,
) -> tuple[Tensor, Tensor]:
    M = mat_a.shape[-2] if a_ids is None else len(a_ids)
    shape = [M, mat_b.shape[-1]]
    if offs is None or (mat_a.dim() == 2 and mat_b.dim() == 2):
        shape = [len(mat_a) if offs is None else len(offs), *shape]
    h = mat_a.new_empty(shape if saves else 0, dtype=out_dtype)
    if is_glu(activation):
        shape = [*shape[:-1], shape[-1] // 2]
    return mat_a.new_empty(shape, dtype=out_dtype), h


def _fake_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    mat_a, mat_b, _, bias = rest[:4]
    return tuple(
        mat_a.new_empty(tensor.shape if need and tensor is not None else 0)
        for tensor, need in zip((mat_a, mat_b, bias), rest[-1], strict=True)
    )


define(
    f"grouped_mm({_INPUTS}, int activation, ScalarType out_dtype, bool saves)"
    " -> (Tensor out, Tensor h)",
    reference=_grouped_mm_reference.forward,
    fake=_fake,
)
define(
    f"grouped_mm_backward(Tensor grad, {_INPUTS}, Tensor h, int activation, bool[3] output_mask)"
    " -> (Tensor grad_a, Tensor grad_b, Tensor grad_bias)",
    reference=_grouped_mm_reference.backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], h)
    ctx.activation = inputs[5]


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    need_a, need_b, _, need_bias = ctx.needs_input_grad[:4]
    needed = [need_a, need_b, need_bias]
    grads = torch.ops.m2ae_kernels.grouped_mm_backward(
        grad, *ctx.saved_tensors, ctx.activation, needed
    )
    by_a, by_b, by_bias = (g if need else None for g, need in zip(grads, needed, strict=True))
    return by_a, by_b, None, by_bias, *(None,) * 4


torch.library.register_autograd("m2ae_kernels::grouped_mm", _backward, setup_context=_setup_context)
refuse_second_derivative("grouped_mm")
registered = torch.ops.m2ae_kernels.grouped_mm.default
