"""Every layout and activation that experts of transformers have, against their definition."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers_cases import D, E, assert_same, made_experts, tokens

from m2ae_kernels import register_transformers_experts


def gradients(experts, x, ids, weights, grad):
    """The output of experts, and gradients of all that has one, by name."""
    x, weights = (t.to(grad.dtype).requires_grad_() for t in (x, weights))
    out = experts(x, ids, weights)
    named = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    grads = torch.autograd.grad(out, list(named.values()), grad)
    return {"out": out, **dict(zip(named, grads, strict=True))}


def assert_right(experts, exact, dtype, relative):
    register_transformers_experts()
    x, ids, weights = tokens()
    x, weights, grad = x.to(dtype), weights.to(dtype), torch.randn(len(x), D).to(dtype)
    found = gradients(experts, x, ids, weights, grad)
    right = gradients(exact, x, ids, weights, grad.double())
    assert found["out"].dtype == dtype
    assert_same({name: t.double() for name, t in found.items()}, right, relative)


# Three products in a row, forward and back, of up to 48 terms: 3 sqrt(48) 2^-24.
SINGLE = 1.2e-6
LAYOUTS = {
    "gated": {},
    "plain": {"has_gate": False},
    "biases": {"has_bias": True},
    "transposed": {"is_transposed": True},
    "all": {"is_transposed": True, "has_bias": True, "has_gate": False},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout):
    assert_right(*made_experts(**layout), torch.float32, SINGLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["gated", "all"])
def test_sixteen_bits(layout, dtype):
    # Products and sums are float32; hidden values are rounded to the dtype once, by eps / 2 at
    # most, and so are the result and each gradient.
    experts, exact = made_experts(dtype=dtype, **LAYOUTS[layout])
    assert_right(experts, exact, dtype, torch.finfo(dtype).eps)


@pytest.mark.parametrize("act", ["silu", "swish", "gelu", "relu", nn.GELU(), F.relu], ids=str)
def test_gates(act):
    assert_right(*made_experts(act), torch.float32, SINGLE)


PLAIN = ["gelu_new", "gelu_accurate", "gelu_pytorch_tanh", "relu2", "linear", nn.GELU("tanh")]


@pytest.mark.parametrize("act", [*PLAIN, F.silu, F.gelu], ids=str)
def test_activations_without_gate(act):
    assert_right(*made_experts(act, has_gate=False), torch.float32, SINGLE)


def test_ids_of_another_rank_are_skipped():
    experts, exact = made_experts()
    register_transformers_experts()
    x, ids, weights = tokens()
    ids[3:9, 0], ids[5, 1] = E, E
    found = gradients(experts, x, ids, weights, torch.ones(len(x), D))
    assert not found["out"][5].any()
    assert not found["weights"][3:9, 0].any()
    right = gradients(exact, x, ids, weights, torch.ones(len(x), D, dtype=torch.float64))
    assert_same({name: t.double() for name, t in found.items()}, right, SINGLE)


def test_float32_tokens_to_bfloat16_experts():
    experts, _ = made_experts(dtype=torch.bfloat16)
    register_transformers_experts()
    x, ids, weights = tokens()
    found = experts(x, ids, weights)
    assert found.dtype == torch.float32
    assert_close(found, experts(x.bfloat16(), ids, weights).float(), rtol=0, atol=0)
