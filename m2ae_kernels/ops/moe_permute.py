r"""moe_permute: the rows of x in the order of moe_sort, so that each expert's lie together.

Math, for sorted row i with slot s = sorted_ids[i] (row r = s // k of the routing, token r mod T):

    rows_i = x_{r mod T},  row_weights_i = w_s        0 where s is -1

Backward is a gather, too, over the slots of each token, in the order of streams, then j:

    dx_t = sum over r with r mod T = t, and j, of drows_{inverse_ids[r, j]}
    dw_{r,j} = drow_weights_{inverse_ids[r, j]}       0 where that is -1

so no two threads write to one place, and the sum has one order on every device.

Kernels: csrc/cpu/moe_permute.cpp on the CPU, csrc/cuda/moe_permute.cu on CUDA.
Papers: Gale et al. 2022, "MegaBlocks"; Tan et al. 2024, "Scattered mixture-of-experts".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m2ae_kernels._library import define
from m2ae_kernels.ops._checks import expect_dtype, refuse_forward_mode, refuse_second_derivative
from m2ae_kernels.ops._moe_arguments import FLOATING, check_moe_permute, raise_as_value_error
from m2ae_kernels.ops._moe_routing import MoERouting
from m2ae_kernels.ops._plain import accumulator


def moe_permute(
    x: Tensor,
    routing: MoERouting,
    *,
    topk_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rows of `x` sorted by expert, once per slot that was kept.

    Args:
        x: [T, D]; float32, bfloat16 or float16. Differentiable.
        routing: what moe_sort returned. R of it is a multiple of T: row r reads x[r % T], so that
            S routings of the same tokens need no copy of them.
        topk_weights: [R, k], to be sorted along; float32 (bfloat16 and float16 are converted).
            Differentiable.

    Returns:
        rows: [N, D], dtype of `x`; row i is that of slot `routing.sorted_ids[i]`, and padding and
            the unused tail are zero.
        row_weights: [N] float32, the weight of each of them, zero likewise; None without
            `topk_weights`.

    Rows are copied bit for bit. The gradient of `x` is summed in float32, in the order of streams,
    then slots, and rounded once; gradients of padding and of the tail are never read. A token with
    no kept slot has gradient 0. Autocast has no say. Differentiable once. For float64, see
    m2ae_kernels.reference.moe_permute.

    Raises:
        ValueError: a shape does not fit; on the CPU also a routing that leads out of range.
        TypeError: a dtype or a device is not as above.
    """
    cure = "; m2ae_kernels.reference.moe_permute takes float64"
    expect_dtype("moe_permute", "x", x, FLOATING, cure)
    if topk_weights is not None:
        expect_dtype("moe_permute", "topk_weights", topk_weights, FLOATING, cure)
    refuse_forward_mode("moe_permute", x, topk_weights)
    return _permute(_op, x, routing, topk_weights)


def reference(
    x: Tensor,
    routing: MoERouting,
    *,
    topk_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What moe_permute means, in plain PyTorch, differentiable; float64 stays float64."""
    return _permute(_reference, x, routing, topk_weights)


def _permute(
    op: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    routing: MoERouting,
    topk_weights: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    check_moe_permute(x, routing, topk_weights)
    weights = topk_weights
    if weights is not None and weights.dtype != torch.float64:
        weights = weights.float()
    try:
        rows, row_weights = op(x, routing.sorted_ids, routing.inverse_ids, weights)
    except RuntimeError as error:
        raise_as_value_error("moe_permute", error)
        raise
    return rows, None if topk_weights is None else row_weights


def rows_or_zero(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], with zeros where the index is -1: [n, D] and [...] to [..., D].

    As an embedding, whose backward PyTorch sums in a fixed order on every device. A row that is not
    asked for is not read, whatever it holds, and there may be none at all.
    """
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    index = torch.where(index >= 0, index, rows.shape[0]).long()
    return torch.nn.functional.embedding(index, padded)


def _reference(
    x: Tensor,  # [T, D]
    sorted_ids: Tensor,  # [N]
    inverse_ids: Tensor,  # [R, k]
    topk_weights: Tensor | None,  # [R, k]
) -> tuple[Tensor, Tensor]:
    token = (sorted_ids // inverse_ids.shape[1]) % max(x.shape[0], 1)
    rows = rows_or_zero(x, torch.where(sorted_ids >= 0, token, -1))
    if topk_weights is None:
        return rows, x.new_empty(0, dtype=accumulator(x.dtype))
    return rows, rows_or_zero(topk_weights.flatten()[:, None], sorted_ids).squeeze(1)


def _fake(
    x: Tensor, sorted_ids: Tensor, inverse_ids: Tensor, topk_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    N = sorted_ids.shape[0]
    rows = x.new_empty(N, x.shape[1])
    if topk_weights is None:
        return rows, x.new_empty(0, dtype=accumulator(x.dtype))
    return rows, topk_weights.new_empty(N)


def _backward_reference(
    grad_rows: Tensor | None,  # [N, D]
    grad_row_weights: Tensor | None,  # [N]
    inverse_ids: Tensor,  # [R, k]
    T: int,
    D: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weights = _backward_fake(
        grad_rows, grad_row_weights, inverse_ids, T, D, output_mask
    )
    R, k = inverse_ids.shape
    if grad_rows is not None and output_mask[0]:
        terms = grad_rows.to(accumulator(grad_rows.dtype))
        total = terms.new_zeros(T, D)
        of_streams = inverse_ids.view(R // T if T > 0 else 0, T, k)
        for of_stream in of_streams.unbind():
            for of_slot in of_stream.unbind(1):
                total = total + rows_or_zero(terms, of_slot)
        grad_x = total.to(grad_rows.dtype)
    if grad_row_weights is not None and output_mask[1]:
        grad_weights = rows_or_zero(grad_row_weights[:, None], inverse_ids).squeeze(2)
    return grad_x, grad_weights


def _backward_fake(
    grad_rows: Tensor | None,
    grad_row_weights: Tensor | None,
    inverse_ids: Tensor,
    T: int,
    D: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weights = (inverse_ids.new_empty(0, dtype=torch.float32) for _ in range(2))
    if grad_rows is not None and output_mask[0]:
        grad_x = grad_rows.new_empty(T, D)
    if grad_row_weights is not None and output_mask[1]:
        grad_weights = grad_row_weights.new_empty(inverse_ids.shape)
    return grad_x, grad_weights


define(
    "moe_permute(Tensor x, Tensor sorted_ids, Tensor inverse_ids, Tensor? topk_weights)"
    " -> (Tensor rows, Tensor row_weights)",
    reference=_reference,
    fake=_fake,
)
define(
    "moe_permute_backward(Tensor? grad_rows, Tensor? grad_row_weights, Tensor inverse_ids,"
    " SymInt T, SymInt D, bool[2] output_mask) -> (Tensor grad_x, Tensor grad_weights)",
    reference=_backward_reference,
    fake=_backward_fake,
)
_op = torch.ops.m2ae_kernels.moe_permute.default


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, inverse_ids, topk_weights = inputs
    if topk_weights is None:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the rows would be N x D
    ctx.save_for_backward(inverse_ids)
    ctx.shape = x.shape


def _backward(
    ctx: Any, grad_rows: Tensor | None, grad_row_weights: Tensor | None
) -> tuple[Tensor | None, ...]:
    needed = [
        ctx.needs_input_grad[0] and grad_rows is not None,
        ctx.needs_input_grad[3] and grad_row_weights is not None,
    ]
    grads = torch.ops.m2ae_kernels.moe_permute_backward(
        grad_rows, grad_row_weights, *ctx.saved_tensors, *ctx.shape, needed
    )
    grad_x, grad_weights = (
        grad if need else None for grad, need in zip(grads, needed, strict=True)
    )
    return grad_x, None, None, grad_weights


torch.library.register_autograd(
    "m2ae_kernels::moe_permute", _backward, setup_context=_setup_context
)
refuse_second_derivative("moe_permute")
