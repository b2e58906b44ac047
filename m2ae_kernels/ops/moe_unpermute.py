r"""moe_unpermute: the weighted sum of what the experts made of each token.

Math, for row r of the routing and its sorted rows i_j = inverse_ids[r, j], j < k:

    out_r = residual_r + sum_j w_{r,j} y_{i_j}        without the terms where i_j is -1

in float32, in this order, rounded once. Backward, for sorted row i of slot s = (r, j):

    dy_i = w_s dout_r,  0 where sorted_ids[i] is -1      dresidual = dout
    dw_{r,j} = <dout_r, y_{i_j}>  in float32,  0 where i_j is -1

It is a gather, unlike an index_add_ over the sorted rows: no zeros to start from, no weighted copy
of y, no atomics.

Kernels: csrc/cpu/moe_unpermute.cpp on the CPU, csrc/cuda/moe_unpermute.cu on CUDA.
Papers: Shazeer et al. 2017, "Outrageously large neural networks", eq. 1; Gale et al. 2022,
"MegaBlocks".
"""

from typing import Any

import torch
from torch import Tensor

from m2ae_kernels._library import define
from m2ae_kernels.ops._checks import expect_dtype, refuse_forward_mode, refuse_second_derivative
from m2ae_kernels.ops._moe_arguments import FLOATING, check_moe_unpermute, raise_as_value_error
from m2ae_kernels.ops._moe_routing import MoERouting
from m2ae_kernels.ops._plain import accumulator
from m2ae_kernels.ops.moe_permute import rows_or_zero


def moe_unpermute(
    y: Tensor,
    routing: MoERouting,
    topk_weights: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Bring rows in sorted order back to their tokens, weighted and summed.

    Args:
        y: [N, D], in the order of `routing.sorted_ids`; float32, bfloat16 or float16.
            Differentiable. Rows of padding and of the unused tail are never read.
        routing: what moe_sort returned.
        topk_weights: [R, k] float32 (bfloat16 and float16 are converted); None: a plain sum.
            Differentiable. That of a dropped slot is never read.
        residual: [R, D], dtype of `y`, added. Differentiable.
        out: [R, D], dtype of `y`, contiguous, to write to; it may be `residual`, and may share no
            memory with the other inputs. Not where a gradient is needed.

    Returns:
        [R, D], dtype of `y`; `out` if given. A row with no kept slot is 0, or its residual, and
        passes no gradient to the weights.

    Sums are in float32 for every dtype, in order of the slots after the residual, and rounded once;
    also under autocast. Differentiable once. For float64, see m2ae_kernels.reference.moe_unpermute.

    Raises:
        ValueError: a shape does not fit, or `out` is not as above; on the CPU also a routing that
            leads out of range.
        TypeError: a dtype or a device is not as above.
    """
    cure = "; m2ae_kernels.reference.moe_unpermute takes float64"
    expect_dtype("moe_unpermute", "y", y, FLOATING, cure)
    if topk_weights is not None:
        expect_dtype("moe_unpermute", "topk_weights", topk_weights, FLOATING, cure)
    refuse_forward_mode("moe_unpermute", y, topk_weights, residual)
    check_moe_unpermute(y, routing, topk_weights, residual, out)
    weights = None if topk_weights is None else topk_weights.float()
    inputs = (y, routing.sorted_ids, routing.inverse_ids, weights, residual)
    try:
        if out is None:
            return torch.ops.m2ae_kernels.moe_unpermute(*inputs)
        _check_overlap(out, y, topk_weights, residual)
        torch.ops.m2ae_kernels.moe_unpermute_out(*inputs, out)
    except RuntimeError as error:
        raise_as_value_error("moe_unpermute", error)
        raise
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def reference(
    y: Tensor,
    routing: MoERouting,
    topk_weights: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What moe_unpermute means, in plain PyTorch, differentiable; float64 stays float64."""
    check_moe_unpermute(y, routing, topk_weights, residual, out)
    if topk_weights is not None and topk_weights.dtype != torch.float64:
        topk_weights = topk_weights.float()
    result = _reference(y, routing.sorted_ids, routing.inverse_ids, topk_weights, residual)
    return result if out is None else out.copy_(result)


def _check_overlap(
    out: Tensor, y: Tensor, topk_weights: Tensor | None, residual: Tensor | None
) -> None:
    """`out` may be the residual itself; else a row would be read after it was written."""
    if torch.compiler.is_compiling() or out.numel() == 0:
        return  # tracers see no memory
    inputs = (("y", y), ("topk_weights", topk_weights), ("residual", residual))
    for name, tensor in inputs:
        if tensor is None or tensor.numel() == 0:
            continue
        itself = tensor.data_ptr() == out.data_ptr() and tensor.stride() == out.stride()
        if name == "residual" and itself:
            continue
        begin, end = _extent(tensor)
        if begin < out.data_ptr() + out.nbytes and out.data_ptr() < end:
            raise ValueError(f"moe_unpermute: expected out apart from {name}, got shared memory")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses from the first byte to behind the last."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _reference(
    y: Tensor,  # [N, D]
    sorted_ids: Tensor,  # [N]
    inverse_ids: Tensor,  # [R, k]
    topk_weights: Tensor | None,  # [R, k]
    residual: Tensor | None,  # [R, D]
) -> Tensor:
    dtypes = [tensor.dtype for tensor in (y, topk_weights) if tensor is not None]
    dtype = accumulator(*dtypes)
    rows = y.to(dtype)
    total = rows.new_zeros(inverse_ids.shape[0], y.shape[1]) if residual is None else residual
    total = total.to(dtype)
    for j, place in enumerate(inverse_ids.unbind(1)):
        term = rows_or_zero(rows, place)
        if topk_weights is not None:
            # Not by a product with 0: the weight of a dropped slot may be NaN.
            weight = torch.where(place >= 0, topk_weights[:, j], 0)
            term = weight[:, None].to(dtype) * term
        total = total + term
    return total.to(y.dtype)


def _fake(
    y: Tensor,
    sorted_ids: Tensor,
    inverse_ids: Tensor,
    topk_weights: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    return y.new_empty(inverse_ids.shape[0], y.shape[1])


def _out_reference(
    y: Tensor,
    sorted_ids: Tensor,
    inverse_ids: Tensor,
    topk_weights: Tensor | None,
    residual: Tensor | None,
    out: Tensor,  # [R, D]
) -> None:
    inputs = (y, sorted_ids, inverse_ids, topk_weights, residual)
    out.copy_(torch.ops.m2ae_kernels.moe_unpermute(*inputs))


def _backward_reference(
    grad_out: Tensor,  # [R, D]
    y: Tensor | None,  # [N, D], needed for the weights alone
    sorted_ids: Tensor,
    inverse_ids: Tensor,
    topk_weights: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    grad_y, grad_weights = _backward_fake(
        grad_out, y, sorted_ids, inverse_ids, topk_weights, output_mask
    )
    dtype = accumulator(grad_out.dtype)
    grad = grad_out.to(dtype)
    if output_mask[0]:
        row = torch.where(sorted_ids >= 0, sorted_ids // inverse_ids.shape[1], -1)
        rows = rows_or_zero(grad, row)
        if topk_weights is not None:
            rows = rows * rows_or_zero(topk_weights.flatten()[:, None], sorted_ids).to(dtype)
        grad_y = rows.to(grad_out.dtype)
    if output_mask[1] and topk_weights is not None and y is not None:
        terms = [(grad * rows_or_zero(y.to(dtype), j)).sum(1) for j in inverse_ids.unbind(1)]
        kept = inverse_ids >= 0
        grad_weights = torch.where(kept, torch.stack(terms, 1), 0).to(topk_weights.dtype)
    return grad_y, grad_weights


def _backward_fake(
    grad_out: Tensor,
    y: Tensor | None,
    sorted_ids: Tensor,
    inverse_ids: Tensor,
    topk_weights: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    grad_y, grad_weights = grad_out.new_empty(0), grad_out.new_empty(0, dtype=torch.float32)
    if output_mask[0]:
        grad_y = grad_out.new_empty(sorted_ids.shape[0], grad_out.shape[1])
    if output_mask[1] and topk_weights is not None and y is not None:
        grad_weights = topk_weights.new_empty(inverse_ids.shape)
    return grad_y, grad_weights


_INPUTS = "Tensor y, Tensor sorted_ids, Tensor inverse_ids, Tensor? topk_weights, Tensor? residual"
define(f"moe_unpermute({_INPUTS}) -> Tensor", reference=_reference, fake=_fake)
define(
    f"moe_unpermute_out({_INPUTS}, Tensor(a!) out) -> ()",
    reference=_out_reference,
    fake=lambda *_: None,
)
# It has no gradient: without this, every call would pass through a warning hook.
torch.library.impl("m2ae_kernels::moe_unpermute_out", "Autograd", torch.library.fallthrough_kernel)
define(
    "moe_unpermute_backward(Tensor grad_out, Tensor? y, Tensor sorted_ids, Tensor inverse_ids,"
    " Tensor? topk_weights, bool[2] output_mask) -> (Tensor grad_y, Tensor grad_weights)",
    reference=_backward_reference,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, sorted_ids, inverse_ids, topk_weights, _ = inputs
    # y is the largest tensor here, and only the gradient of the weights reads it.
    y = y if topk_weights is not None and ctx.needs_input_grad[3] else None
    ctx.save_for_backward(y, sorted_ids, inverse_ids, topk_weights)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    needs_y, _, _, needs_weights, needs_residual = ctx.needs_input_grad
    grad_y, grad_weights = None, None
    if needs_y or needs_weights:
        grad_y, grad_weights = torch.ops.m2ae_kernels.moe_unpermute_backward(
            grad_out, *ctx.saved_tensors, [needs_y, needs_weights]
        )
    return (
        grad_y if needs_y else None,
        None,
        None,
        grad_weights if needs_weights else None,
        grad_out if needs_residual else None,
    )


torch.library.register_autograd(
    "m2ae_kernels::moe_unpermute", _backward, setup_context=_setup_context
)
refuse_second_derivative("moe_unpermute")
