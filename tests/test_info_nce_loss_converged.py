"""info_nce_loss where pairs are nearly converged: what is left to lose keeps its digits.

A loss that is a difference of a logit and a log-sum-exp, or a gradient with p - 1 of a rounded p,
has none left there: in float32 at 1 - p below 1e-7.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import EPS, assert_matches, exact, number
from interpreter import fewer, interpret_only
from torch.testing import assert_close

# scale: about how much 1 - p is then
LEFT = {33.0: 1e-3, 44.0: 1e-5, 55.0: 1e-7, 70.0: 1e-9, 150.0: 1e-19}


def pairs(device, dtype=torch.float32, N=64, D=128):
    """Keys with cosines of about 0.6 among each other, and queries close to them."""
    keys = F.normalize(torch.randn(N, D)) * 0.64
    keys[:, 0] += 0.77
    query = F.normalize(keys + 0.01 * torch.randn(N, D))
    sides = (query, F.normalize(keys))
    return [z.to(device, dtype).requires_grad_() for z in sides]


def gradients(query, key, scale, **given):
    """The exact loss, and its gradients of the rounded inputs, not rounded again."""
    inputs = [t.detach().double().requires_grad_() for t in (query, key, scale)]
    loss = exact(*inputs, **given)
    return loss, torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", LEFT)
def test_nearly_converged_pairs(scale, normalize, dtype, impl):
    interpret_only(
        "33.0-True-torch.bfloat16",
        "44.0-False-torch.float16",
        "55.0-True-torch.float32",
        "70.0-False-torch.bfloat16",
    )
    op, device = impl
    query, key = pairs(device, dtype)
    scale, left = number(scale, device), LEFT[scale]
    expected, wanted = gradients(query, key, scale, normalize=normalize)
    assert left / 30 < expected < left * 30
    loss = op(query, key, scale, normalize=normalize)
    # Two logits of up to 1.05 s, each rounded in its product and by its scale: a few EPS of s, of
    # which, over many rows and random, 1e-5 is left up to s = 70.
    near = 1e-5 if scale <= 70 else 4 * EPS * scale.item()
    assert_close(loss.double(), expected, rtol=near, atol=0.0)
    # float16 has no numbers below 6e-8, and the gradients here go down to 1e-22: GradScaler.
    factor = 1.0 if dtype != torch.float16 else 2.0 ** math.floor(-math.log2(wanted[0].abs().max()))
    grads = torch.autograd.grad(loss * factor, (query, key, scale))
    for grad, right in zip(grads, wanted, strict=True):
        error = (grad.double() / factor - right).norm() / right.norm()
        assert error <= (4 * near if dtype == torch.float32 else 3e-3)
    assert grads[2] < 0  # a larger scale is better still


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nearly_converged_with_targets_and_masks(dtype, impl):
    interpret_only("torch.bfloat16")
    op, device = impl
    query, key = pairs(device, dtype)
    order = torch.randperm(64, device=device)
    query = query.detach()[order].requires_grad_()
    mask = torch.rand(64, device=device) < 0.7
    for name, masks in fewer({"query": {"query_mask": mask}, "key": {"key_mask": mask}}.items()):
        scale = number(55.0, device)
        given = {"target": order, "normalize": True, **masks}
        expected, wanted = gradients(query, key, scale, **given)
        loss = op(query, key, scale, **given)
        assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)
        grads = torch.autograd.grad(loss, (query, key, scale))
        for grad, right in zip(grads, wanted, strict=True):
            assert (grad.double() - right).norm() <= 3e-3 * right.norm(), name


def test_nearly_converged_rows_among_others(impl):
    op, device = impl
    # Upstream gradients that differ by 1e6: the rows that are left must not be lost in the others.
    query, key = pairs(device, torch.bfloat16)
    losses = op(query, key, 55.0, reduction="none", symmetric=False)[:1]
    x, y = (t.detach().double().requires_grad_() for t in (query, key))
    expected = exact(x, y, 55.0, reduction="none", symmetric=False)
    upstream = torch.logspace(0, 6, 64, dtype=torch.float64, device=device)
    (grad,) = torch.autograd.grad(losses, query, [upstream.float()])
    (right,) = torch.autograd.grad(expected, x, [upstream])
    errors = (grad.double() - right).norm(dim=1) / right.norm(dim=1)
    assert errors.max() <= 8e-3  # each row by itself, of 128 numbers rounded to bfloat16


@pytest.mark.parametrize("scale", [7.0, 14.0, 23.0, 46.0, 80.0])
def test_nearly_converged_loss_in_closed_form(scale, impl):
    op, device = impl
    # Orthogonal pairs: each row has the logits s and 0, so loss = log(1 + exp(-s)), here to 2e-35.
    query, key = (torch.eye(2, device=device, requires_grad=True) for _ in range(2))
    number_ = number(scale, device)
    loss = op(query, key, number_)
    left = math.exp(-scale) / (1 + math.exp(-scale))
    # To base 2 the logit is s log2(e): by its own rounding and the factor's off by up to EPS s.
    near = {"rtol": max(1.3e-6, EPS * scale), "atol": 0.0}
    assert_close(loss.item(), math.log1p(math.exp(-scale)), **near)
    loss.backward()
    sign = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], device=device)
    assert_close(query.grad, sign * (scale * left / 2), **near)
    assert_close(key.grad, sign * (scale * left / 2), **near)
    assert_close(number_.grad.item(), -left, **near)


@pytest.mark.parametrize("k", [2, 3])
def test_nearly_converged_several_positives(k, impl):
    interpret_only("2")
    op, device = impl
    # k equal positives: the loss is log k + log(1 + R / S), whose gradient is all in the log1p.
    query, key = pairs(device, N=20)
    query, key = (t.detach().repeat(k, 1).requires_grad_() for t in (query, key))
    ids = torch.arange(20 * k, device=device) % 20
    given = {"query_ids": ids, "key_ids": ids, "same_id": "positive"}
    scale = number(30.0, device)
    loss_q, _ = op(query, key, scale, reduction="none", **given)
    assert_close(loss_q, torch.full_like(loss_q, math.log(k)), rtol=1e-3, atol=0.0)
    assert_matches(op, query, key, scale, reduction="none", **given)
    assert_matches(op, query, key, scale, label_smoothing=0.1, **given)
