"""info_nce_loss where digits are at stake: scales, large logits, nearly converged pairs."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_info_nce_loss import EPS, exact, features
from torch.testing import assert_close


@pytest.mark.parametrize("scale", [0.0, 1.0, 14.3, 50.0, 100.0, 200.0, 1e4, -5.0])
def test_scales(scale, impl):
    op, device = impl
    query, key = features(16, 20, D=32, device=device)
    number = torch.tensor([scale], device=device, requires_grad=True)
    loss, expected = op(query, key, number, normalize=True), None
    expected = exact(query, key, number, normalize=True).sum()
    assert_close(loss, expected.float())
    assert_close(op(query, key, scale, normalize=True), loss)
    inputs = (query, key, number)
    for grad, wanted in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        # Float32 rounds logits of |scale| by up to |scale| EPS, and the softmax by as much
        # relatively; a few roundings of the dot product come to it.
        assert_close(grad, wanted, rtol=8 * EPS * max(abs(scale), 1.0), atol=1e-5)


def test_logits_far_from_zero(impl):
    op, device = impl
    query, key = features(8, 8, D=16, device=device)
    opposite = F.normalize(query.detach()) + 1e-3
    assert_close(  # all cosines about -1: exp(-100) is no float32 of full precision
        op(opposite, -opposite[:1].expand(8, -1), 100.0, normalize=True),
        exact(opposite, -opposite[:1].expand(8, -1), 100.0, normalize=True).float(),
    )
    large = [t.detach().mul(1e3).requires_grad_() for t in (query, key)]
    loss = op(*large, 30.0)  # logits of 1e7
    assert_close(loss, exact(*large, 30.0).float())
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, large))


@pytest.mark.parametrize("scale", [7.0, 14.0, 23.0, 46.0])
def test_pairs_that_are_nearly_right(scale, impl):
    op, device = impl
    # Two orthogonal pairs: each row has the logits s and 0, so loss = log(1 + exp(-s)).
    query = torch.eye(2, device=device, requires_grad=True)
    key = torch.eye(2, device=device, requires_grad=True)
    number = torch.tensor(scale, device=device, requires_grad=True)
    loss = op(query, key, number)
    p = math.exp(-scale) / (1 + math.exp(-scale))
    near = {"rtol": 1.3e-6, "atol": 0.0}  # torch's rtol; a loss of 1e-20 needs atol = 0
    assert_close(loss.item(), math.log1p(math.exp(-scale)), **near)
    loss.backward()
    sign = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], device=device)
    assert_close(query.grad, sign * (scale * p / 2), **near)
    assert_close(key.grad, sign * (scale * p / 2), **near)
    assert_close(number.grad.item(), -p, **near)


@pytest.mark.parametrize("scale", [14.3, 30.0, 50.0, 70.0, 100.0])
def test_training_that_converges(scale, impl):
    op, device = impl
    (x,) = features(64, D=128, device=device)
    key = F.normalize(x.detach())
    query = F.normalize(key + 0.02 * torch.randn_like(key)).requires_grad_()
    key.requires_grad_()
    number = torch.tensor(scale, device=device, requires_grad=True)
    x, y, s = query.double(), key.double(), number.double()
    logits = s * x @ y.mT
    rest = [(z - logits.diag()[:, None]).exp().tril(-1) for z in (logits, logits.mT)]
    rest = [
        r + (z - logits.diag()[:, None]).exp().triu(1)
        for r, z in zip(rest, (logits, logits.mT), strict=True)
    ]
    expected = sum(torch.log1p(r.sum(1)).mean() for r in rest) / 2  # without cancellation
    loss = op(query, key, number)
    # A logit is rounded by about EPS of its size, at most the scale, and that is what exp of a
    # difference of two loses relatively; atol = 0, as the loss goes down to 1e-29.
    near = 4 * EPS * scale
    assert_close(loss, expected.float(), rtol=near, atol=0.0)
    inputs = (query, key, number)
    for grad, wanted in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert (grad - wanted).norm() <= near * wanted.norm()
