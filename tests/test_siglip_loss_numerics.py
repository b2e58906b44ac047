"""siglip_loss where digits are at stake: large logits, pairs nearly right, sums of many entries."""

import math

import pytest
import torch
import torch.nn.functional as F
from interpreter import fewer, interpret_only, interpreted
from test_siglip_loss import EPS, exact, features, numbers
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from m2ae_kernels import reference


def assert_near(loss, expected, inputs, rtol):
    """Loss, and gradients by their norm: an element may be what is left of larger terms."""
    assert_close(loss.double(), expected, rtol=rtol, atol=0.0)
    grads = torch.autograd.grad(loss.sum(), inputs)
    wanted = torch.autograd.grad(expected.sum(), inputs)
    for grad, right in zip(grads, wanted, strict=True):
        assert (grad - right).norm() <= rtol * right.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 14.3, 50.0, 100.0, 200.0, 1e4, -5.0])
def test_scales(scale, reduction, impl):
    op, device = impl
    inputs = *features(16, 20, D=32, device=device), *numbers([scale], [-4.0], device=device)
    given = {"normalize": True, "reduction": reduction}
    loss, expected = op(*inputs, **given), exact(*inputs, **given)
    assert_close(loss, expected.float())
    assert torch.equal(op(*inputs[:2], scale, -4.0, **given), loss)
    grads = torch.autograd.grad(loss.sum(), inputs)
    for grad, wanted in zip(grads, torch.autograd.grad(expected.sum(), inputs), strict=True):
        # Float32 rounds logits of |scale| by up to |scale| EPS, and sigma by as much relatively;
        # a few roundings of the dot product come to it.
        near = 8 * EPS * max(abs(scale), 1.0)
        assert_close(grad, wanted, rtol=near, atol=near * wanted.abs().max().item())


@pytest.mark.parametrize("bias", [-1e4, -200.0, -100.0, -50.0, -10.0, 0.0, 10.0, 100.0, 1e4])
def test_biases(bias, impl):
    op, device = impl
    inputs = *features(8, 9, D=16, device=device), *numbers(10.0, bias, device=device)
    loss, expected = op(*inputs), exact(*inputs)
    assert_close(loss, expected.float())
    grads = torch.autograd.grad(loss, inputs)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, inputs), strict=True):
        # Some of 72 entries of order 1 may cancel.
        assert_close(grad, wanted, rtol=1e-5, atol=8 * EPS * max(wanted.abs().max().item(), 1))


def test_logits_far_from_zero(impl):
    op, device = impl
    large = [t.detach().mul(1e3).requires_grad_() for t in features(8, 8, D=16, device=device)]
    for reduction in ("sum", "none"):
        loss = op(*large, 30.0, -10.0, reduction=reduction)  # logits of 1e7
        expected = exact(*large, 30.0, -10.0, reduction=reduction)
        # The loss is the logits: sums of 16 products that are larger than what is left of them.
        assert_close(loss, expected.float(), rtol=16 * EPS, atol=0.0)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), large))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("logit", [7.0, 14.0, 23.0, 46.0, 80.0])
def test_pairs_and_negatives_that_are_nearly_right(logit, reduction, impl):
    op, device = impl
    # Orthogonal pairs: a pair has the logit s + b = a, the other six entries b = -a.
    images = torch.eye(3, device=device, requires_grad=True)
    texts = torch.eye(3, device=device, requires_grad=True)
    inputs = images, texts, *numbers(2 * logit, -logit, device=device)
    loss = op(*inputs, reduction=reduction)
    rtol = 8 * EPS  # s, b and the logits are exact
    expected = 9 * math.log1p(math.exp(-logit))
    assert_close(loss.sum().item(), expected, rtol=rtol, atol=0.0)
    p = math.exp(-logit) / (1 + math.exp(-logit))
    grads = torch.autograd.grad(loss.sum(), inputs)
    sign = (1 - 2 * torch.eye(3, device=device)) * (2 * logit * p)
    assert_close(grads[0], sign, rtol=rtol, atol=0.0)
    assert_close(grads[1], sign, rtol=rtol, atol=0.0)
    assert_close(grads[2].item(), -3 * p, rtol=rtol, atol=0.0)
    assert_close(grads[3].item(), 3 * p, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "scale,bias", [(10.0, -10.0), (50.0, -30.0), (100.0, -60.0), (150.0, -75.0)]
)
def test_training_that_converges(scale, bias, reduction, impl):
    op, device = impl
    (x,) = features(64, D=128, device=device)
    texts = F.normalize(x.detach())
    images = F.normalize(texts + 0.02 * torch.randn_like(texts)).requires_grad_()
    inputs = images, texts.requires_grad_(), *numbers(scale, bias, device=device)
    loss, expected = op(*inputs, reduction=reduction), exact(*inputs, reduction=reduction)
    # A logit is rounded by about EPS of its size and that of the terms it is summed from, and that
    # is what exp of it loses relatively; atol = 0, as the loss of a row goes down to 1e-20.
    assert_near(loss, expected, inputs, 4 * EPS * (scale - bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_that_converge(dtype, impl):
    op, device = impl
    (x,) = features(64, D=128, device=device)
    texts = F.normalize(x.detach()).to(dtype).requires_grad_()
    images = F.normalize(texts.detach().float() + 0.02 * torch.randn_like(texts.float()))
    images = images.to(dtype).requires_grad_()
    inputs = images, texts, *numbers(60.0, -20.0, device=device)
    loss, expected = op(*inputs), exact(*inputs)
    assert_close(loss, expected.float(), rtol=4 * EPS * 80, atol=0.0)
    exactly = [t.detach().double().requires_grad_() for t in inputs]
    grads = torch.autograd.grad(loss * 2.0**10, inputs)
    wanted = torch.autograd.grad(exact(*exactly) * 2.0**10, exactly)
    for grad, right in zip(grads, wanted, strict=True):
        assert (grad.double() - right).norm() <= torch.finfo(dtype).eps * right.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_entries_are_summed_without_losing_small_ones(reduction, impl):
    op, device = impl
    # 4 million negatives of the same loss: a running float32 sum would be off by 1e-3.
    N, M = (125, 1000) if interpreted() else (1000, 4000)
    images, texts = torch.full((N, 4), 0.25, device=device), torch.full((M, 4), 0.5, device=device)
    inputs = images.requires_grad_(), texts.requires_grad_(), *numbers(3.0, -7.1, device=device)
    loss, expected = op(*inputs, reduction=reduction), exact(*inputs, reduction=reduction)
    assert_close(loss, expected.float(), rtol=64 * EPS, atol=0.0)
    # A matrix product does add them one after the other, 4000 of one size at the most.
    assert_near(loss, expected, inputs, 512 * EPS)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_decides_memory_and_not_the_result(dtype, reduction, impl):
    interpret_only("torch.float32-none", "torch.bfloat16-mean")
    op, device = impl
    inputs = (
        *features(300, 700, D=24, device=device, dtype=dtype),
        *numbers(10.0, -5.0, device=device),
    )
    runs = []
    for workspace in fewer((0, 1 << 30, 1 << 19), 2):
        loss = op(*inputs, reduction=reduction, max_workspace_bytes=workspace)
        runs.append((loss, *torch.autograd.grad(loss.sum(), inputs)))
    for run in runs[1:]:
        assert_close(run[0], runs[0][0])
        for grad, first in zip(run[1:], runs[0][1:], strict=True):
            # As if it were one sum: another order, but no rounding to 16 bits between the chunks.
            last_bit = torch.finfo(grad.dtype).eps
            near = 32 * EPS * first.abs().max().item()
            assert_close(grad, first, rtol=last_bit, atol=near)


def test_images_of_several_ranks_add_up(impl):
    op, device = impl
    inputs = *features(10, 10, D=6, device=device), *numbers(10.0, -5.0, device=device)
    whole = op(*inputs)
    parts = [
        op(inputs[0][begin:end], *inputs[1:], target_offset=begin, reduction="sum")
        for begin, end in ((0, 3), (3, 10))  # uneven
    ]
    assert_close(sum(parts) / 10, whole)
    grads = (torch.autograd.grad(loss, inputs) for loss in (sum(parts) / 10, whole))
    for grad, wanted in zip(*grads, strict=True):
        assert_close(grad, wanted)


def test_initial_loss_of_the_paper(impl):
    op, device = impl
    images, texts = (F.normalize(t.detach()) for t in features(512, 512, D=64, device=device))
    loss = op(images, texts, 10.0, -10.0)
    assert 8 < loss.item() < 12  # a pair has about softplus(10), 511 negatives almost nothing


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_reference_has_all_derivatives(reduction, normalize):
    rows = [t.detach().double().requires_grad_() for t in features(4, 5, D=3)]
    inputs = *rows, *numbers(3.0, -1.0, dtype=torch.float64)
    given = {
        "target": torch.tensor([1, 1, -100, 3]),
        "key_mask": torch.tensor([True, True, False, True, True]),
        "query_ids": torch.tensor([0, 1, 1, 2]),
        "key_ids": torch.tensor([0, 0, 1, 1, 2]),
        "weight": torch.tensor([1.0, 0.5, -2.0, 3.0]),
    }
    for same_id in ("negative", "ignore", "positive"):

        def loss(*inputs, same_id=same_id):
            options = {"same_id": same_id, "normalize": normalize, "reduction": reduction}
            return reference.siglip_loss(*inputs, **given, **options)

        assert gradcheck(loss, inputs)
        assert gradgradcheck(loss, inputs)
        assert_close(
            loss(*inputs),
            exact(*inputs, **given, normalize=normalize, same_id=same_id, reduction=reduction),
        )


def test_reference_gives_nothing_to_absent_rows():
    inputs = [*features(3, 3, D=4), *numbers(9.0, -3.0)]
    with torch.no_grad():
        inputs[0][1], inputs[1][2] = math.nan, math.inf
    query_mask = torch.tensor([True, False, True])
    key_mask = torch.tensor([True, True, False])
    for normalize in (True, False):
        given = {"query_mask": query_mask, "key_mask": key_mask, "normalize": normalize}
        loss = reference.siglip_loss(*inputs, **given)
        grads = torch.autograd.grad(loss, inputs)
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[0][1].any()
        assert not grads[1][2].any()
