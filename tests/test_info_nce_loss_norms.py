"""info_nce_loss with normalize: rows of any norm, and what it does to gradients."""

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import EPS, assert_matches, exact, features, number
from interpreter import interpret_only
from torch.testing import assert_close


def test_zero_and_extreme_norms_of_rows(impl):
    op, device = impl
    query, key = features(6, 6, D=5, device=device)
    with torch.no_grad():
        query[0] = 0
        query[1] *= 1e-20
        query[2] *= 1e20
        key[3] *= 1e-6
        key[4] = 0
        key[5] *= 1e18
    loss = op(query, key, 9.0, normalize=True)
    expected = exact(query, key, 9.0, normalize=True)
    assert_close(loss, expected.float())
    grads = torch.autograd.grad(loss, (query, key))
    for grad, wanted in zip(grads, torch.autograd.grad(expected, (query, key)), strict=True):
        # A gradient is the larger the smaller its row: compare as if the rows were of norm 1, or
        # of 1e-12, the eps; and atol for what cancels to 0 on the way.
        norm = (query if grad is grads[0] else key).detach().double().norm(dim=1, keepdim=True)
        norm = norm.clamp(min=1e-12)
        assert_close(grad.double() * norm, wanted.double() * norm, rtol=1.3e-6, atol=1e-6)


def test_zero_rows_get_their_gradient_divided_by_eps(impl):
    op, device = impl
    query, key = features(4, 4, D=5, device=device)
    query.detach()[0] = 0
    (grad,) = torch.autograd.grad(op(query, key, 9.0, normalize=True), query)
    x = F.normalize(query.detach()).requires_grad_()
    y = F.normalize(key.detach())
    (of_normalized,) = torch.autograd.grad(op(x, y, 9.0), x)
    assert_close(grad[0], of_normalized[0] * 1e12)
    mask = torch.tensor([False, True, True, True], device=device)
    (grad,) = torch.autograd.grad(op(query, key, 9.0, normalize=True, query_mask=mask), query)
    assert not grad[0].any()


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.9])
def test_zero_and_extreme_norms_around_eps(eps, impl):
    interpret_only("0.9")
    op, device = impl
    query, key = features(12, 14, D=5, device=device)
    assert_matches(op, query, key, number(9.0, device), normalize=True, eps=eps)
    short = [t.detach().mul(1e-3).requires_grad_() for t in (query, key)]
    assert_matches(op, *short, number(9.0, device), normalize=True, eps=eps, reduction="none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_zero_and_extreme_norms_of_16_bits(dtype, impl):
    op, device = impl
    query, key = (t.detach() for t in features(6, 6, D=5, device=device, dtype=dtype))
    small = query * 2.0 ** (-130 if dtype == torch.bfloat16 else -14)  # subnormal
    large = key * 2.0 ** (120 if dtype == torch.bfloat16 else 14)
    for x, y in ((small, key), (large, key), (large, small)):
        given = {"normalize": True, "eps": 1e-38}
        assert_close(op(x, y, 9.0, **given), exact(x, y, 9.0, **given).float())


def test_norms_do_not_matter(impl):
    op, device = impl
    query, key = features(10, 12, D=8, device=device)
    factor = 2.0 ** torch.randint(-3, 4, (10, 1), device=device)
    expected = op(query, key, 9.0, normalize=True)
    # A power of two changes no digit of a product or a root.
    assert torch.equal(op(query.detach() * factor, key, 9.0, normalize=True), expected)
    (grad,) = torch.autograd.grad(expected, query)
    along = (grad * query.detach()).sum(1)
    assert along.abs().max() <= 16 * EPS * grad.norm(dim=1).max()  # gradients are orthogonal


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_normalized_inside_as_outside(scale, impl):
    interpret_only("100.0")
    op, device = impl
    query, key = features(20, 24, D=16, device=device)
    grads = []
    for inside in (True, False):
        x, y = (query, key) if inside else (F.normalize(query), F.normalize(key))
        loss = op(x, y, scale, normalize=inside)
        grads.append((loss, *torch.autograd.grad(loss, (query, key))))
    for actual, expected in zip(*grads, strict=True):
        # rows are rounded on the way: logits by EPS of the scale
        assert_close(actual, expected, rtol=4 * EPS * scale, atol=4 * EPS * scale)
