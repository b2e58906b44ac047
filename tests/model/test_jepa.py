"""The JEPA branch: what it reads, and what it must not read."""

import dataclasses

import pytest
import torch
from small_model import PATCHES, gradients, masks_for, with_config
from torch.testing import assert_close

from m2ae.config import LossWeights
from m2ae.masking import DenseMasks, IndexMasks


@pytest.mark.parametrize("pred_loss", ["mse", "smooth_l1"])
def test_visible_targets_do_not_matter(small, make_inputs, monkeypatch, pred_loss):
    small = with_config(small, jepa=dataclasses.replace(small.config.jepa, pred_loss=pred_loss))
    inputs = make_inputs(3)
    for masks in (masks_for(small, 3), masks_for(small, 3, "bernoulli")):
        if isinstance(masks, DenseMasks):
            visible = masks.visible
        else:
            visible = torch.zeros(3, PATCHES, dtype=torch.bool)
            visible = visible.scatter(1, masks.keep_idx.long(), True)
        target = torch.randn(3, PATCHES, 24)
        changed = torch.where(visible[..., None], torch.nan, target)
        losses = []
        for features in (target, changed, target + 1):
            monkeypatch.setattr(small.target_encoder, "forward", lambda _, x=features: x)
            losses.append(small(inputs, masks=masks).losses["jepa"])
        assert_close(losses[0], losses[1], rtol=0, atol=0)
        assert losses[2] != losses[0]


def test_masked_pixels_do_not_reach_the_prediction(small, make_inputs, monkeypatch):
    features = torch.randn(2, PATCHES, 24)
    monkeypatch.setattr(small.target_encoder, "forward", lambda _: features)
    inputs = make_inputs(2)
    visible = torch.ones(2, 4, 4, dtype=torch.bool)
    visible[:, :2] = False
    dense = DenseMasks(visible.flatten(1))
    rows = torch.arange(16, dtype=torch.int32).expand(2, -1)
    index = IndexMasks(rows[:, 8:], rows[:, :8])
    before = [small(inputs, masks=masks).losses["jepa"] for masks in (dense, index)]
    inputs["pixel_values"][:, :, :16] = torch.rand(2, 3, 16, 32)
    after = [small(inputs, masks=masks).losses["jepa"] for masks in (dense, index)]
    assert_close(after, before, rtol=0, atol=0)
    assert_close(before[0], before[1])  # the dense route is the indexed one, computed in full


def test_dense_masks_of_nothing_or_everything_are_defined(small, make_inputs):
    visible = torch.zeros(2, PATCHES, dtype=torch.bool)
    visible[1] = True
    output = small(make_inputs(2), masks=DenseMasks(visible))
    assert output.losses["jepa"] > 0
    assert all(grad.isfinite().all() for grad in gradients(small, output).values())
    nothing_to_predict = small(make_inputs(2), masks=DenseMasks(visible | True))
    assert nothing_to_predict.losses["jepa"] == 0


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_ratio"])
def test_the_gradient_is_that_of_a_loss_with_constant_targets(small, make_inputs, masking):
    model = with_config(small, loss=LossWeights(recon=0, align=0)).double()
    masks = masks_for(small, 3, masking)
    inputs = make_inputs(3)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    bias = model.image_encoder.proj.bias

    def jepa():
        return model(inputs, masks=masks).losses["jepa"]

    (grad,) = torch.autograd.grad(jepa(), bias)
    step = 1e-5
    for d in (0, 7):
        with torch.no_grad():
            bias[d] += step
            above = jepa()
            bias[d] -= 2 * step
            below = jepa()
            bias[d] += step
        # central differences are off by step^2 and by rounding / step, both about 1e-10
        assert_close(grad[d], (above - below) / (2 * step), rtol=1e-5, atol=1e-8)


def test_without_masks_there_is_no_jepa_term(small, make_inputs):
    assert "jepa" not in small(make_inputs()).losses


def test_masks_of_another_batch_are_refused(small, make_inputs):
    with pytest.raises(ValueError, match=r"expected masks.keep_idx of shape \[4, patches\], got"):
        small(make_inputs(4), masks=masks_for(small, 3))
    with pytest.raises(
        ValueError, match=r"expected masks.visible of shape \[4, 16\], got \[3, 16\]"
    ):
        small(make_inputs(4), masks=masks_for(small, 3, "bernoulli"))
