"""What moe_sort, moe_permute and moe_unpermute accept."""

import re

import torch
from torch import Tensor

from m2ae_kernels.ops._checks import expect_device, expect_dtype
from m2ae_kernels.ops._moe_routing import MoERouting

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
WITH_FLOAT64 = (*FLOATING, torch.float64)
INTEGERS = (torch.int32, torch.int64)
DROP_POLICIES = ("position", "slot", "prob")  # by their number in the registered op
MOST_ROWS = 2**31 - 1  # of the sorted order, whose indices are int32


def raise_as_value_error(op: str, error: RuntimeError) -> None:
    """Of what only kernels look at, as it takes a pass over the ids; other errors stay."""
    refusal = re.search(rf"{op}: expected .*", str(error))
    if refusal is not None:
        raise ValueError(refusal[0]) from None


def check_moe_sort(
    topk_ids: Tensor,
    num_experts: int,
    capacity: int | None,
    drop_policy: str,
    topk_weights: Tensor | None,
    align: int,
) -> None:
    expect_dtype("moe_sort", "topk_ids", topk_ids, INTEGERS)
    shape = list(topk_ids.shape)
    if topk_ids.dim() != 2 or topk_ids.shape[1] == 0:
        raise ValueError(f"moe_sort: expected topk_ids [R, k] with k >= 1, got {shape}")
    if num_experts < 1:
        raise ValueError(f"moe_sort: expected num_experts >= 1, got {num_experts}")
    if align < 1:
        raise ValueError(f"moe_sort: expected align >= 1, got {align}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"moe_sort: expected capacity >= 0 or None, got {capacity}")
    if drop_policy not in DROP_POLICIES:
        raise ValueError(
            f'moe_sort: expected drop_policy "position", "slot" or "prob", got {drop_policy!r}'
        )
    if topk_weights is not None:
        check_weights("moe_sort", topk_weights, topk_ids, "topk_ids")
    elif drop_policy == "prob" and capacity is not None:
        raise ValueError('moe_sort: expected topk_weights for drop_policy "prob", got None')
    rows = sorted_rows(topk_ids, num_experts, align)
    if rows > MOST_ROWS:
        raise ValueError(f"moe_sort: expected less than 2^31 sorted rows, got {rows}")


def sorted_rows(topk_ids: Tensor, num_experts: int, align: int) -> int:
    """N: room for every slot, and for the padding of every expert."""
    most = topk_ids.shape[0] * topk_ids.shape[1] + num_experts * (align - 1)
    return (most + align - 1) // align * align


def check_weights(op: str, weights: Tensor, ids: Tensor, name: str) -> None:
    """[R, k], as `ids` is, which the caller knows as `name`."""
    expect_dtype(op, "topk_weights", weights, WITH_FLOAT64)
    if weights.shape != ids.shape:
        raise ValueError(
            f"{op}: expected topk_weights [R, k] = {list(ids.shape)}, got {list(weights.shape)}"
        )
    expect_device(op, "topk_weights", weights, name, ids.device)


def check_routing(op: str, routing: MoERouting, first: str, rows: Tensor) -> None:
    """On the device of `rows`, the op's argument `first`."""
    for name, tensor, dim in (
        ("sorted_ids", routing.sorted_ids, 1),
        ("inverse_ids", routing.inverse_ids, 2),
    ):
        expect_dtype(op, f"routing.{name}", tensor, (torch.int32,))
        if tensor.dim() != dim or (dim == 2 and tensor.shape[1] == 0):
            wanted = "[N]" if dim == 1 else "[R, k] with k >= 1"
            raise ValueError(f"{op}: expected routing.{name} {wanted}, got {list(tensor.shape)}")
        expect_device(op, f"routing.{name}", tensor, first, rows.device)


def check_moe_permute(x: Tensor, routing: MoERouting, topk_weights: Tensor | None) -> None:
    expect_dtype("moe_permute", "x", x, WITH_FLOAT64)
    if x.dim() != 2:
        raise ValueError(f"moe_permute: expected x [T, D], got {list(x.shape)}")
    check_routing("moe_permute", routing, "x", x)
    T, R = x.shape[0], routing.inverse_ids.shape[0]
    if R % T != 0 if T > 0 else R != 0:
        raise ValueError(
            f"moe_permute: expected R of the routing to be a multiple of T = {T}, got {R}"
        )
    if topk_weights is not None:
        check_weights("moe_permute", topk_weights, routing.inverse_ids, "x")


def check_moe_unpermute(
    y: Tensor,
    routing: MoERouting,
    topk_weights: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
) -> None:
    expect_dtype("moe_unpermute", "y", y, WITH_FLOAT64)
    check_routing("moe_unpermute", routing, "y", y)
    N, R = routing.sorted_ids.shape[0], routing.inverse_ids.shape[0]
    if y.dim() != 2 or y.shape[0] != N:
        raise ValueError(f"moe_unpermute: expected y [N = {N}, D], got {list(y.shape)}")
    if topk_weights is not None:
        check_weights("moe_unpermute", topk_weights, routing.inverse_ids, "y")
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is None:
            continue
        if tensor.shape != (R, y.shape[1]):
            raise ValueError(
                f"moe_unpermute: expected {name} [R, D] = {[R, y.shape[1]]},"
                f" got {list(tensor.shape)}"
            )
        if tensor.dtype != y.dtype:
            raise TypeError(
                f"moe_unpermute: expected {name} in the dtype of y, {y.dtype}, got {tensor.dtype}"
            )
        expect_device("moe_unpermute", name, tensor, "y", y.device)
    if out is not None:
        _check_out(out, (y, topk_weights, residual))


def _check_out(out: Tensor, inputs: tuple[Tensor | None, ...]) -> None:
    if not out.is_contiguous():
        raise ValueError(
            f"moe_unpermute: expected out contiguous, got strides {list(out.stride())}"
        )
    tensors = [tensor for tensor in (out, *inputs) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "moe_unpermute: expected no gradient to be needed with out, got tensors that require"
            " one; leave out, or call it under torch.no_grad()"
        )
