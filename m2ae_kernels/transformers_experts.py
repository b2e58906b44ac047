"""Mixture-of-experts models of Hugging Face transformers, run by expert_mlp.

transformers keeps a registry of functions that compute what a model's experts do, and every model
whose experts it stacks ([E, 2 H, D] and [E, D, H]) takes the one its config names. Their routers,
and what surrounds the experts, stay as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2ae_kernels.ops.expert_mlp import FLOATING, expert_mlp

_OP = "register_transformers_experts"
# What transformers calls an activation, and what expert_mlp does. Several names are one function.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "linear": "identity",
}
_GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}


def register_transformers_experts(name: str = "m2ae_kernels", model: Any = None) -> None:
    """Let models of transformers compute their experts by expert_mlp, forward and backward.

    Args:
        name: under which transformers knows it from now on, in this process:
            `from_pretrained(..., experts_implementation=name)`, `from_config`, and
            `model.set_experts_implementation(name)`, also to go back to "eager" or "grouped_mm".
        model: a transformers model to switch over at once, all its experts, checked before. Its
            parameters are neither copied nor renamed, so checkpoints, optimizers and wrappers see
            no difference.

    Experts that are served: stacked weights in either order of dimensions, with or without biases;
    gated by silu, gelu or relu, gate rows before up rows; or not gated, by these, tanh's gelu, the
    square of relu, or nothing. Experts with a gate of their own (clamped, as in gpt-oss), with
    interleaved rows, with a norm behind them, with any other activation, or quantized, are
    refused; the error comes here, or without `model`, from the first forward. An id of E or more,
    which transformers gives to experts of another rank, is skipped.

    Router weights are taken as float32, and sums are float32, for every dtype. Weights in
    [E, D, 2 H], as in Aria, are handed on as strided views; the CPU kernel makes a dense copy of
    those for the time of a call.

    Raises:
        ImportError: transformers is not installed.
        ValueError: `name` is taken; `model` has no experts that transformers dispatches, some that
            are not served, or some that did not take the name.
        TypeError: `model` is no transformers model.
    """
    activations, moe = _transformers()
    registry = moe.ALL_EXPERTS_FUNCTIONS
    taken = name == "eager" or getattr(registry.get(name), "__module__", __name__) != __name__
    if taken:
        raise ValueError(f"{_OP}: expected a name that is free, got {name!r}, which is another's")
    known = {type(activations.ACT2FN[theirs]): ours for theirs, ours in _ACTIVATIONS.items()}

    def experts_forward(
        experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        activation = _activation_of(experts, known, moe.__name__)
        return _experts(experts, activation, hidden_states, top_k_index, top_k_weights)

    registry.register(name, experts_forward)
    if model is None:
        return
    if not hasattr(model, "set_experts_implementation"):
        raise TypeError(f"{_OP}: expected a transformers model, got {type(model).__name__}")
    # What transformers' decorator sets on experts, and on nothing else.
    dispatched = [module for module in model.modules() if hasattr(module, "is_transposed")]
    if not dispatched:
        raise ValueError(
            f"{_OP}: expected a model with experts that transformers dispatches, got"
            f" {type(model).__name__}, which has none"
        )
    for experts in dispatched:
        _activation_of(experts, known, moe.__name__)
    model.set_experts_implementation(name)
    for experts in dispatched:
        if (found := experts.config._experts_implementation) != name:
            raise ValueError(
                f"{_OP}: expected {type(experts).__name__} to take {name!r}, got {found!r}"
            )


def _transformers() -> tuple[Any, Any]:
    """The activations of transformers, and its registry of experts."""
    try:
        from transformers import activations
        from transformers.integrations import moe
    except ImportError as error:
        raise ImportError(
            f"{_OP}: expected transformers 5.9 or later, got {error};"
            " pip install 'm2ae[transformers]'"
        ) from error
    return activations, moe


def _activation_of(experts: Any, known: dict[type[Any], str], default_gate: str) -> str:
    """What expert_mlp calls what these experts do; `default_gate`: module of transformers' gate."""

    def refuse(expected: str, found: object) -> ValueError:
        return ValueError(
            f"{_OP}: expected {expected}, got {found} in {type(experts).__name__};"
            ' experts_implementation="grouped_mm" takes any'
        )

    gated = experts.has_gate
    for weight in (experts.gate_up_proj if gated else experts.up_proj, experts.down_proj):
        if weight.dtype not in FLOATING:  # quantized ones have a registry of their own
            raise refuse("weights in float32, bfloat16 or float16", weight.dtype)
    # transformers 5.9 has no post_expert_norm.
    if getattr(experts, "has_post_expert_norm", False):
        raise refuse("no norm behind the experts", "post_expert_norm")
    if gated and type(experts)._apply_gate.__module__ != default_gate:
        raise refuse("act_fn(gate) * up", "an _apply_gate of its own")
    if gated and not experts.is_concatenated:
        raise refuse("gate rows before up rows", "interleaved rows")
    function = experts.act_fn
    activation = known.get(type(function))
    if isinstance(function, nn.GELU):
        activation = "gelu_tanh" if function.approximate == "tanh" else "gelu"
    for plain, ours in ((F.silu, "silu"), (F.gelu, "gelu"), (F.relu, "relu")):
        activation = ours if function is plain else activation
    if gated:
        activation = _GATED.get(activation or "")
    if activation is None:
        allowed = _GATED if gated else sorted(set(_ACTIVATIONS.values()))
        raise refuse(
            f"act_fn {', '.join(allowed)} of {'gated' if gated else 'plain'} experts", function
        )
    return activation


def _experts(
    experts: Any, activation: str, x: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """What transformers' experts compute for x [T, D], ids and weights [T, k]."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    w1, w2 = getattr(experts, first), experts.down_proj
    if experts.is_transposed:  # [E, D, 2 H] and [E, H, D]
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    biases = (f"{first}_bias", "down_proj_bias") if experts.has_bias else ()
    b1, b2 = (getattr(experts, bias) for bias in biases) if biases else (None, None)
    E = w1.shape[0]
    out = expert_mlp(
        # As transformers' grouped_mm does: norms may hand on float32 to 16-bit experts.
        x.to(w1.dtype),
        w1,
        w2,
        topk_weights.to(torch.float32),
        torch.where(topk_ids < E, topk_ids, -1),
        b1=b1,
        b2=b2,
        activation=activation,
    )
    return out.to(x.dtype)
