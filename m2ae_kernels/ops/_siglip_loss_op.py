"""The registered ops of siglip_loss: schemas, shapes, autograd. Contract: siglip_loss.py

siglip_loss returns the weighted sum of the losses of the queries and, where `gradients` asks for
them, its gradients in float32, so that none is too small for the dtype of its input before the
upstream one has arrived. With per_row it returns the weighted losses, [N], and no gradients.

siglip_loss_backward recomputes, for upstream gradients per row, or for a sum whose gradients were
not asked for. siglip_loss_backward_stored multiplies those that were with the upstream one. It is
an op for its second derivative alone: as a plain product it would have one, without all that the
stored gradients owe to the features. They are arguments so that autograd asks for that derivative.

`workspace` bounds, in bytes, the temporaries that grow with N x M. `same_id` is a value of
_contrastive_pairs.SAME_ID. An output that was not asked for is empty.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from m2ae_kernels._library import define
from m2ae_kernels.ops import _siglip_loss_reference
from m2ae_kernels.ops._checks import refuse_second_derivative
from m2ae_kernels.ops._plain import accumulator

_FEATURES = "Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor logit_bias"
_ROWS = (
    "Tensor? target, Tensor? query_mask, Tensor? key_mask, Tensor? query_ids, Tensor? key_ids,"
    " Tensor? weight"
)
_OPTIONS = "SymInt target_offset, int ignore_index, int same_id, bool normalize, float eps"
_STORED = "Tensor grad_image, Tensor grad_text, Tensor grad_scale, Tensor grad_bias"


def _fake(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    normalize, _, per_row, gradients, _, _ = rest[-6:]
    N, M, dtype = len(image_features), len(text_features), accumulator(image_features.dtype)
    inputs = (image_features, text_features, logit_scale, logit_bias)
    shapes: list[tuple[int, ...]] = [
        t.shape if made else (0,) for t, made in zip(inputs, gradients, strict=True)
    ]
    norms = [(N,), (M,)] if normalize else [(0,), (0,)]
    shapes = [(N,) if per_row else (), *shapes, *norms]
    return tuple(image_features.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs = zip(rest[:4], rest[-1], strict=True)
    return tuple(x.new_empty(x.shape if need else 0) for x, need in inputs)


def _backward_stored(
    grad: Tensor,  # []
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    grad_image: Tensor,  # [N, D], as the following in float32
    grad_text: Tensor,  # [M, D]
    grad_scale: Tensor,  # []
    grad_bias: Tensor,  # []
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (image_features, text_features, logit_scale, logit_bias)
    stored = (grad_image, grad_text, grad_scale, grad_bias)
    return tuple(
        (grad * made).to(x.dtype) if need else x.new_empty(0)
        for x, made, need in zip(inputs, stored, output_mask, strict=True)
    )


_GRADS = (
    "(Tensor grad_image_features, Tensor grad_text_features, Tensor grad_logit_scale,"
    " Tensor grad_logit_bias)"
)
define(
    f"siglip_loss({_FEATURES}, {_ROWS}, {_OPTIONS}, bool per_row, bool[4] gradients,"
    f" bool allow_tf32, SymInt workspace) -> (Tensor loss, {_STORED}, Tensor rnorm_q,"
    " Tensor rnorm_k)",
    reference=_siglip_loss_reference.forward,
    fake=_fake,
)
define(
    f"siglip_loss_backward(Tensor grad, {_FEATURES}, {_ROWS}, Tensor rnorm_q, Tensor rnorm_k,"
    f" {_OPTIONS}, bool allow_tf32, SymInt workspace, bool[4] output_mask) -> {_GRADS}",
    reference=_siglip_loss_reference.backward,
    fake=_fake_backward,
)
define(
    f"siglip_loss_backward_stored(Tensor grad, {_FEATURES}, {_STORED}, bool[4] output_mask)"
    f" -> {_GRADS}",
    reference=_backward_stored,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = inputs[:10], inputs[10:]
    *_, _, gradients, allow_tf32, workspace = options
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.gradients = gradients
    ctx.options = (*options[:5], allow_tf32, workspace)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 19
    needed = list(ctx.needs_input_grad[:4])
    saved = ctx.saved_tensors
    if all(made for made, need in zip(ctx.gradients, needed, strict=True) if need):
        grads = torch.ops.m2ae_kernels.siglip_loss_backward_stored(
            grad, *saved[:4], *saved[10:14], needed
        )
    else:
        grads = torch.ops.m2ae_kernels.siglip_loss_backward(
            grad, *saved[:10], *saved[14:], *ctx.options, needed
        )
    grads = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return *grads, *(None,) * 15


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError(
        "siglip_loss: expected one backward, got a second derivative;"
        " m2ae_kernels.reference.siglip_loss has it"
    )


torch.library.register_autograd(
    "m2ae_kernels::siglip_loss", _backward, setup_context=_setup_context
)
refuse_second_derivative("siglip_loss")
torch.library.register_autograd("m2ae_kernels::siglip_loss_backward_stored", _refuse)
registered = torch.ops.m2ae_kernels.siglip_loss.default
