"""Losses against loops written from their formulas."""

import math

import pytest
import torch
from reference import spec_chain
from torch.testing import assert_close

from m2ae.config import AlignConfig
from m2ae.losses.contrastive import AlignmentLoss
from m2ae.losses.jepa import jepa_loss
from m2ae.losses.reconstruction import image_reconstruction_loss, text_reconstruction_loss


def spoiled(x, mask):
    """X with NaN wherever it does not count."""
    return torch.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim)), x, torch.nan)


def check_masked(loss, shape, mask):
    """NaN where nothing counts changes neither the value nor the gradient, which is 0 there."""
    prediction, target = torch.randn(shape), torch.randn(shape)
    mask_shape = mask.reshape(*mask.shape, *(1,) * (len(shape) - mask.ndim)).expand(shape)
    values = []
    for p, t in [(prediction, target), (spoiled(prediction, mask), spoiled(target, mask))]:
        p = p.clone().requires_grad_()
        t = t.clone().requires_grad_()
        value = loss(p, t, mask)
        value.backward()
        assert t.grad is None
        assert not p.grad[~mask_shape].any()
        assert p.grad[mask_shape].all()
        values.append(value.detach())
    assert torch.equal(*values)
    assert loss(prediction, target, mask & False) == 0
    return values[0], (prediction - target)[mask_shape]


def test_image_loss_is_the_mean_square_of_present_images():
    mask = torch.tensor([True, False, True])
    value, errors = check_masked(image_reconstruction_loss, (3, 3, 4, 4), mask)
    assert_close(value, errors.square().mean())


def test_text_loss_is_the_mean_square_of_tokens():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    value, errors = check_masked(text_reconstruction_loss, (3, 3, 5), mask)
    assert_close(value, errors.square().mean())


def test_text_loss_looks_at_the_first_positions_only():
    prediction, target = torch.randn(2, 7, 5), torch.randn(2, 4, 5)
    mask = torch.ones(2, 4, dtype=torch.bool)
    expected = (prediction[:, :4] - target).square().mean()
    assert_close(text_reconstruction_loss(prediction, target, mask), expected)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
def test_jepa_loss_is_the_mean_error_of_masked_patches(kind):
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    value, errors = check_masked(lambda p, t, m: jepa_loss(p, t, m, kind), (2, 3, 8), mask)
    huber = torch.where(errors.abs() < 1, errors**2 / 2, errors.abs() - 0.5)
    assert_close(value, (errors.square() if kind == "mse" else huber).mean())


@pytest.mark.parametrize(
    "dtype, result", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_losses_are_float32_or_wider(dtype, result):
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    here = torch.ones(2, dtype=torch.bool)
    assert image_reconstruction_loss(x, x + 1, here).dtype == result
    assert jepa_loss(x[0], x[0] + 1, torch.ones(3, 4, dtype=torch.bool)).dtype == result


def test_alignment_is_symmetric_info_nce_of_cosines():
    loss = AlignmentLoss(AlignConfig(temperature=0.2))
    image, text = 3 * torch.randn(5, 6), torch.randn(5, 6)
    here = torch.ones(5, dtype=torch.bool)
    assert_close(loss(image, text, here), spec_chain.align(image, text, 0.2))
    pairs = torch.tensor([True, False, True, True, False])
    expected = spec_chain.align(image[pairs], text[pairs], 0.2)
    assert_close(loss(spoiled(image, pairs), spoiled(text, pairs), pairs), expected)


def test_items_that_are_no_pairs_have_no_gradient():
    loss = AlignmentLoss(AlignConfig())
    image, text = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    pairs = torch.tensor([True, False, True, True])
    loss(image, text, pairs).backward()
    for x in (image, text):
        assert not x.grad[1].any()
        assert x.grad[pairs].any(dim=1).all()


def test_one_pair_or_none_is_zero():
    loss = AlignmentLoss(AlignConfig())
    image, text = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    for pairs in (torch.tensor([False, True, False, False]), torch.zeros(4, dtype=torch.bool)):
        assert loss(image, text, pairs) == 0
    assert loss(image[:0], text[:0], pairs[:0]) == 0


def test_a_learned_temperature_is_held_at_its_limit_and_can_come_back():
    loss = AlignmentLoss(AlignConfig(temperature=0.02, max_scale=50))
    assert_close(loss.scale(), torch.tensor(50.0))
    with torch.no_grad():
        loss.log_scale.add_(2)
    x = torch.randn(6, 4)
    value = loss(x, -x, torch.ones(6, dtype=torch.bool))  # wrong: a lower scale is better
    assert_close(loss.scale(), torch.tensor(50.0))
    value.backward()
    assert loss.log_scale.grad > 0
    torch.optim.SGD([loss.log_scale], lr=1e-2).step()
    assert loss.scale() < 50


def test_a_fixed_temperature_is_saved_but_not_learned():
    loss = AlignmentLoss(AlignConfig(temperature=0.03, learn_temperature=False))
    assert not list(loss.parameters())
    assert_close(loss.state_dict()["log_scale"], torch.tensor(-math.log(0.03)))
