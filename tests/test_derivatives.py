"""What every differentiable op says to torch.func and to forward mode."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

import m2ae_kernels
from m2ae_kernels._library import SCHEMAS

T, D, E, k = 6, 8, 5, 2
IDS = torch.arange(T * k).remainder(E).view(T, k)
ROUTING = m2ae_kernels.moe_sort(IDS, E)
OFFS = torch.tensor([2, T], dtype=torch.int32)
WEIGHTS = torch.linspace(0.1, 1, T * k).view(T, k)


def w(*shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


# Of rows [T, D]: each op, by its public function or that of the reference.
CALLS = {
    "patch_embed": lambda op, x: op(x.view(1, 1, T, D), w(3, 1, 2, 2)),
    "info_nce_loss": lambda op, x: op(x, w(T, D).to(x), 2.0),
    "siglip_loss": lambda op, x: op(x, w(T, D).to(x), torch.tensor(2.0), torch.tensor(-1.0)),
    "topk_gating": lambda op, x: op(x, k).topk_weights,
    "moe_permute": lambda op, x: op(x, ROUTING)[0],
    "moe_unpermute": lambda op, x: op(x.repeat(k, 1), ROUTING, WEIGHTS),
    "grouped_mm": lambda op, x: op(x, w(2, D, 3).to(x), offs=OFFS),
    "expert_mlp": lambda op, x: op(x, w(E, 3, D).to(x), w(E, 4, 3).to(x), WEIGHTS, IDS),
}


def test_every_op_with_a_backward_is_here():
    backwards = {op.removesuffix("_backward") for op in SCHEMAS if op.endswith("_backward")}
    assert set(CALLS) == backwards


@pytest.mark.parametrize("name", CALLS)
def test_function_transforms_are_refused(name):
    op, x = getattr(m2ae_kernels, name), torch.randn(T, D)
    with pytest.raises(RuntimeError, match="with functorch transforms"):  # PyTorch's own words
        torch.func.grad(lambda x: CALLS[name](op, x).sum())(x)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused(name):
    op, x = getattr(m2ae_kernels, name), torch.randn(T, D)
    message = rf"^{name}: expected reverse mode, got a tangent of forward mode; .*reference\.{name}"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        CALLS[name](op, forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda x: CALLS[name](op, x), (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_of_the_reference(name):
    op, x = getattr(m2ae_kernels.reference, name), torch.randn(T, D, dtype=torch.float64)
    direction = torch.randn_like(x)
    loss = lambda x: CALLS[name](op, x).double().square().sum()  # noqa: E731
    _, derivative = torch.func.jvp(loss, (x,), (direction,))
    assert_close(derivative, (torch.func.grad(loss)(x) * direction).sum())
