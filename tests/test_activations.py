"""The fused activations and their derivatives against formulas in float64 and their autograd."""

import math

import pytest
import torch
from torch.testing import assert_close

from m2ae_kernels.ops._activations import (
    ACTIVATIONS,
    activate,
    activate_backward,
    activation_id,
    is_glu,
)


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def tanh_gelu(x):
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


PLAIN = {
    "identity": lambda x: x,
    "gelu": gelu,
    "gelu_tanh": tanh_gelu,
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}
GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def formula(x, name):
    if name in GATES:
        gate, up = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return PLAIN[GATES[name]](gate) * up
    return PLAIN[name](x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives(name, dtype):
    # No zero, where relu has no derivative; 0.02 steps through all bends, and far ends.
    x = torch.cat([torch.arange(-6, 6, 0.02) + 0.01, torch.tensor([-80.0, -20, 20, 80])])
    x = torch.stack([x, x.flip(0)]).to(dtype)
    activation = ACTIVATIONS.index(name)
    exact = x.double().requires_grad_()
    value = formula(exact, name)
    grad = torch.randn_like(value)
    (by_x,) = torch.autograd.grad(value, exact, grad)
    # gelu and silu of numbers below -5 are products of x with what float32 leaves of 1 - 1 or of
    # a rounded exponential: an absolute error of 6 * 2^-24 times |grad| <= 5.
    tolerance = {"rtol": 1.3e-6, "atol": 2e-6} if dtype == torch.float32 else {}
    assert_close(activate(x, activation), value.detach().to(dtype), **tolerance)
    assert_close(activate_backward(grad.to(dtype), x, activation), by_x.to(dtype), **tolerance)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays(name):
    x = torch.tensor([[math.nan, 1.0, 2.0, 3.0]])
    assert activate(x, ACTIVATIONS.index(name)).isnan()[0, 0]


def test_gates():
    assert [name for i, name in enumerate(ACTIVATIONS) if is_glu(i)] == list(GATES)


def test_unknown_names_are_refused():
    assert ACTIVATIONS[activation_id("op", "activation", "geglu")] == "geglu"
    with pytest.raises(ValueError, match=r"op: expected activation in identity, .*, got 'elu'"):
        activation_id("op", "activation", "elu")
    with pytest.raises(ValueError, match=r"op: expected output_activation in .*silu, got 'geglu'"):
        activation_id("op", "output_activation", "geglu", glu=False)
