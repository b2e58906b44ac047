"""The activations that grouped_mm and expert_mlp fuse, and their derivatives.

    gelu       x Phi(x)                         Phi(x) + x phi(x)
    gelu_tanh  x (1 + tanh(u)) / 2              u = sqrt(2 / pi) (x + 0.044715 x^3)
    relu       max(x, 0)                        1 for x > 0, else 0
    relu2      max(x, 0)^2                      2 max(x, 0)
    silu       x sigma(x)                       sigma(x) (1 + x (1 - sigma(x)))
    identity   x                                1

Phi and phi are the distribution and the density of the normal distribution. A gated linear unit
takes two values per output, the gate g in the first half of the columns and u in the second:
swiglu silu(g) u, geglu gelu(g) u, reglu relu(g) u. NaN stays NaN.

Papers: Hendrycks & Gimpel 2016, "Gaussian error linear units"; So et al. 2021, "Primer", for
relu2; Shazeer 2020, "GLU variants improve transformer".
"""

from torch import Tensor, ops
from torch.nn import functional as F

# Registered ops know an activation by its place here.
ACTIVATIONS = (
    "identity",
    "gelu",
    "gelu_tanh",
    "relu",
    "relu2",
    "silu",
    "swiglu",
    "geglu",
    "reglu",
)
IDENTITY = 0
_GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def is_glu(activation: int) -> bool:
    return ACTIVATIONS[activation] in _GATES


def gate_of(activation: int) -> str:
    """The activation of the gate of a gated unit; of any other, itself."""
    name = ACTIVATIONS[activation]
    return _GATES.get(name, name)


def activation_id(op: str, name: str, activation: str, *, glu: bool = True) -> int:
    """The place of `activation`, the value of the op's argument `name`, in ACTIVATIONS."""
    allowed = [known for known in ACTIVATIONS if glu or known not in _GATES]
    if activation not in allowed:
        raise ValueError(f"{op}: expected {name} in {', '.join(allowed)}, got {activation!r}")
    return ACTIVATIONS.index(activation)


def activate(x: Tensor, activation: int) -> Tensor:
    """[..., n] of x [..., n], or of [..., 2 n] for a gated unit."""
    name = ACTIVATIONS[activation]
    if name in _GATES:
        gate, up = x.chunk(2, -1)
        return _plain(gate, _GATES[name]) * up
    return _plain(x, name)


def activate_backward(grad: Tensor, x: Tensor, activation: int) -> Tensor:
    """The gradient by x, for `grad` by activate(x). Of PyTorch's own kernels, where it has one."""
    name = ACTIVATIONS[activation]
    if name not in _GATES:
        return _plain_backward(grad, x, name)
    gate, up = x.chunk(2, -1)
    by_gate = _plain_backward(grad * up, gate, _GATES[name])
    return F.pad(by_gate, (0, up.shape[-1])) + F.pad(
        grad * _plain(gate, _GATES[name]), (up.shape[-1], 0)
    )


def _plain(x: Tensor, name: str) -> Tensor:
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "relu":
        return x.relu()
    if name == "relu2":
        return x.relu().square()
    if name == "silu":
        return F.silu(x)
    return x


def _plain_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    if name == "gelu":
        return ops.aten.gelu_backward(grad, x)
    if name == "gelu_tanh":
        return ops.aten.gelu_backward(grad, x, approximate="tanh")
    if name == "relu":
        return grad * (x > 0)
    if name == "relu2":
        return 2 * grad * x.relu()
    if name == "silu":
        return ops.aten.silu_backward(grad, x)
    return grad
