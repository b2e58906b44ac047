"""The activations of ops/_activations.py and their derivatives in Triton, in float32.

A gated unit is the activation of its gate, times the other half; `ACTIVATION` is the place of that
activation in ACTIVATIONS, and GLU says whether there is another half.
"""

from typing import Any

import triton
import triton.language as tl

from m2ae_kernels.ops import _activations
from m2ae_kernels.ops._activations import ACTIVATIONS

IDENTITY = tl.constexpr(ACTIVATIONS.index("identity"))
GELU = tl.constexpr(ACTIVATIONS.index("gelu"))
GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
RELU = tl.constexpr(ACTIVATIONS.index("relu"))
RELU2 = tl.constexpr(ACTIVATIONS.index("relu2"))
SILU = tl.constexpr(ACTIVATIONS.index("silu"))
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
TWO_SQRT_2_BY_PI = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


def constants_of(activation: int) -> dict[str, Any]:
    """How a launch is told of an activation."""
    return {
        "ACTIVATION": ACTIVATIONS.index(_activations.gate_of(activation)),
        "GLU": _activations.is_glu(activation),
    }


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """act(x). NaN stays NaN, which tl.maximum would drop."""
    if ACTIVATION == GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == GELU_TANH:  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        x = x * _sigmoid((x + 0.044715 * x * x * x) * TWO_SQRT_2_BY_PI)
    elif ACTIVATION == RELU:
        x = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == RELU2:
        x = tl.where(x <= 0, 0.0, x * x)
    elif ACTIVATION == SILU:
        x = x * _sigmoid(x)
    return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """act'(x)."""
    if ACTIVATION == GELU:
        by_x = 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * DENSITY_AT_0 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == GELU_TANH:
        s = _sigmoid((x + 0.044715 * x * x * x) * TWO_SQRT_2_BY_PI)
        by_x = s + x * s * (1.0 - s) * TWO_SQRT_2_BY_PI * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == RELU:
        by_x = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == RELU2:
        by_x = tl.where(x <= 0, 0.0, 2.0 * x)
    elif ACTIVATION == SILU:
        s = _sigmoid(x)
        by_x = s * (1.0 + x * (1.0 - s))
    else:
        by_x = tl.full(x.shape, 1.0, tl.float32)
    return by_x
