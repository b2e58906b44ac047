"""What expert_mlp accepts, and its arguments as the registered op takes them."""

from typing import Any

import torch
from torch import Tensor

from m2ae_kernels.ops._activations import activation_id, is_glu
from m2ae_kernels.ops._checks import expect_device, expect_dtype
from m2ae_kernels.ops._expert_mlp_reference import AT_INPUT, AT_OUTPUT, NOWHERE
from m2ae_kernels.ops._moe_routing import MoERouting
from m2ae_kernels.ops._plain import autocast_dtype

_OP = "expert_mlp"
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)
_WEIGHT_AT = {"output": AT_OUTPUT, "input": AT_INPUT, "none": NOWHERE}


def in_one_dtype(
    x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The inputs in the dtype to compute in, which autocast may ask for; on one device."""
    expect_dtype(_OP, "x", x, FLOATING)
    tensors = {"x": x, "w1": w1, "w2": w2, "b1": b1, "b2": b2, "shift": shift}
    for name, tensor in tensors.items():
        expect_device(_OP, name, tensor, "x", x.device)
        if tensor is not None:
            expect_dtype(_OP, name, tensor, FLOATING)
    asked = autocast_dtype(x.device)
    if asked is not None and x.dtype != torch.float64:
        return tuple(None if t is None else t.to(asked) for t in tensors.values())
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{_OP}: expected {name} in the dtype of x, {x.dtype}, got {tensor.dtype}"
            )
    return tuple(tensors.values())


def _expect_shape(name: str, tensor: Tensor | None, letters: str, sizes: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != sizes:
        raise ValueError(f"{_OP}: expected {name} [{letters}], got {list(tensor.shape)}")


def check_shapes(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    shift: Tensor | None,
    activation: int,
) -> None:
    """The matrices and rows of a call fit together."""
    for name, tensor, letters in (
        ("x", x, "[T, D]"),
        ("w1", w1, "[E, H, D]"),
        ("w2", w2, "[E, Do, H]"),
        ("topk_weights", topk_weights, "[R, k]"),
    ):
        if tensor.dim() != letters.count(",") + 1:
            raise ValueError(f"{_OP}: expected {name} {letters}, got {list(tensor.shape)}")
    (T, D), (E, _, H) = x.shape, w2.shape
    R, k = topk_weights.shape
    wide, letter = (2 * H, "2 H") if is_glu(activation) else (H, "H")
    if min(E, D, H, w2.shape[1], k) < 1:
        raise ValueError(
            f"{_OP}: expected E, D, H, Do and k of 1 or more, got x {list(x.shape)},"
            f" w2 {list(w2.shape)}, topk_weights {list(topk_weights.shape)}"
        )
    _expect_shape("w1", w1, f"E = {E}, {letter} = {wide}, D = {D}", (E, wide, D))
    _expect_shape("b1", b1, f"E = {E}, {letter} = {wide}", (E, wide))
    _expect_shape("b2", b2, f"E = {E}, Do = {w2.shape[1]}", (E, w2.shape[1]))
    _expect_shape("topk_ids", topk_ids, f"R = {R}, k = {k}", (R, k))
    S = 1 if shift is None else shift.shape[0] if shift.dim() > 0 else 0
    _expect_shape("shift", shift, f"S, D = {D}", (S, D))
    if S < 1 or R != S * T:
        raise ValueError(f"{_OP}: expected R = S * T = {S} * {T} rows of topk_weights, got {R}")


def check_routing(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, routing: MoERouting | None, E: int
) -> None:
    """The router's tensors; those of `routing` are trusted to be what moe_sort returned."""
    for name, tensor in {"topk_weights": topk_weights, "topk_ids": topk_ids}.items():
        expect_device(_OP, name, tensor, "x", x.device)
    expect_dtype(_OP, "topk_weights", topk_weights, (torch.float32, torch.float64))
    expect_dtype(_OP, "topk_ids", topk_ids, INDICES)
    if routing is None:
        return
    R, k = topk_weights.shape
    for name, tensor in zip(routing._fields, routing, strict=True):
        expect_device(_OP, f"routing.{name}", tensor, "x", x.device)
        expect_dtype(_OP, f"routing.{name}", tensor, (torch.int32,))
    _expect_shape("routing.inverse_ids", routing.inverse_ids, f"R = {R}, k = {k}", (R, k))
    offsets = routing.expert_offsets
    _expect_shape("routing.expert_offsets", offsets, f"E + 1 = {E + 1}", (E + 1,))
    if routing.sorted_ids.dim() != 1 or len(routing.sorted_ids) < R * k:
        raise ValueError(
            f"{_OP}: expected routing.sorted_ids [N] of N >= R * k = {R * k}, got"
            f" {list(routing.sorted_ids.shape)}"
        )


def check_seed(x: Tensor, seed: Tensor | None) -> None:
    if seed is None:
        return
    _expect_shape("seed", seed, "2", (2,))
    expect_dtype(_OP, "seed", seed, (torch.int64,))
    expect_device(_OP, "seed", seed, "x", x.device)


def options_of(
    activation: str,
    output_activation: str,
    dropout_p: float,
    output_dropout_p: float,
    apply_router_weight: str,
) -> tuple[Any, ...]:
    """As the registered op takes them: activation, output_activation, both p, weight_at."""
    ids = (
        activation_id(_OP, "activation", activation),
        activation_id(_OP, "output_activation", output_activation, glu=False),
    )
    for name, p in {"dropout_p": dropout_p, "output_dropout_p": output_dropout_p}.items():
        if not 0 <= p < 1:
            raise ValueError(f"{_OP}: expected 0 <= {name} < 1, got {p}")
    if apply_router_weight not in _WEIGHT_AT:
        raise ValueError(
            f'{_OP}: expected apply_router_weight "output", "input" or "none", got'
            f" {apply_router_weight!r}"
        )
    return *ids, float(dropout_p), float(output_dropout_p), _WEIGHT_AT[apply_router_weight]
