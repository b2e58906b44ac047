"""The connector's objective: its terms, its shares, its gradients, what equal items are."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from m2ae.config import ConnectorLossConfig
from m2ae.losses.connector import connector_loss, mutual_information_bound, prediction_loss

B, D, d = 6, 5, 4


def inputs():
    return [torch.randn(B, width, requires_grad=True) for width in (D, D, d, d)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_terms_add_up_by_their_shares(alpha):
    loss, terms = connector_loss(*inputs(), ConnectorLossConfig(alpha=alpha))
    assert set(terms) == {name for name, share in (("pred", alpha), ("cl", 1 - alpha)) if share}
    assert_close(loss, alpha * terms.get("pred", 0) + (1 - alpha) * terms.get("cl", 0))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_share_of_0_has_no_gradient_and_targets_never_have_one(alpha):
    prediction, target, query, key = tensors = inputs()
    loss, _ = connector_loss(*tensors, ConnectorLossConfig(alpha=alpha))
    loss.backward()
    assert (prediction.grad is not None) == (alpha > 0)
    assert (query.grad is not None) == (key.grad is not None) == (alpha < 1)
    assert target.grad is None


def test_prediction_losses_are_their_formulas():
    prediction, target = (3 * torch.randn(B, D, dtype=torch.float64) for _ in range(2))
    error = (prediction - target).abs()
    assert ((error < 1).any(), (error > 1).any()) == (True, True)  # both branches
    smooth = torch.where(error < 1, error**2 / 2, error - 0.5).sum() / (B * D)
    assert_close(prediction_loss(prediction, target, "smooth_l1"), smooth)
    assert_close(prediction_loss(prediction, target, "squared_norm"), (error**2).sum() / B)


@pytest.mark.parametrize("kind", ["smooth_l1", "squared_norm"])
def test_16_bits_are_taken_to_float32(kind):
    prediction, target = (torch.randn(B, D).bfloat16() for _ in range(2))
    loss = prediction_loss(prediction, target, kind)
    assert loss.dtype == torch.float32
    assert_close(loss, prediction_loss(prediction.float(), target.float(), kind))


def test_contrast_is_equation_6():
    tensors = [t.detach() for t in inputs()]
    config = ConnectorLossConfig(alpha=0.0, temperature=0.2)
    _, terms = connector_loss(*tensors, config)
    q, k = (F.normalize(t.double(), dim=1) for t in tensors[2:])
    scores = q @ k.T / 0.2
    own = scores.diagonal()
    rows, columns = (torch.log(own.exp() / scores.exp().sum(i)) for i in (1, 0))
    assert_close(terms["cl"].double(), -(rows + columns).sum() / (2 * B), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("same_item", ["positive", "ignore", "negative"])
def test_equal_items(same_item):
    """Rows 0 and 1 are one thing: their logits are summed, left out, or negatives."""
    tensors = [t.detach() for t in inputs()]
    ids = torch.tensor([7, 7, 1, 2, 3, 4])
    config = ConnectorLossConfig(alpha=0.0, temperature=0.5, same_item=same_item)
    _, terms = connector_loss(*tensors, config, ids)
    q, k = (F.normalize(t.double(), dim=1) for t in tensors[2:])
    scores = q @ k.T / 0.5
    same, eye = ids[:, None] == ids, torch.eye(B, dtype=torch.bool)
    positive = same if same_item == "positive" else eye
    if same_item == "ignore":
        scores = scores.masked_fill(same & ~eye, -torch.inf)
    wanted = 0.0
    for s, p in ((scores, positive), (scores.T, positive.T)):
        of_pair = -s.log_softmax(1)
        wanted += torch.where(p, of_pair, 0).sum(1).div(p.sum(1)).mean() / 2
    assert_close(terms["cl"].double(), wanted, rtol=1e-5, atol=1e-6)
    plain = connector_loss(*tensors, config)[1]["cl"]
    assert (abs(plain - terms["cl"]) < 1e-6) == (same_item == "negative")


def test_perfect_alignment_shows_log_n_nats():
    eye = torch.eye(8)
    config = ConnectorLossConfig(alpha=0.0, temperature=0.03)
    _, terms = connector_loss(eye, eye, eye, eye, config)
    # log(1 + 7 exp(-1 / 0.03)) is below float32's resolution of log 8.
    assert mutual_information_bound(terms["cl"].item(), 8) == pytest.approx(math.log(8))
    _, terms = connector_loss(eye, eye, torch.ones(8, 8), torch.ones(8, 8), config)
    assert mutual_information_bound(terms["cl"].item(), 8) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"alpha": 1.5}, "ConnectorLossConfig.alpha: expected a share in [0, 1], got 1.5"),
        ({"alpha": -0.1}, "ConnectorLossConfig.alpha: expected a share in [0, 1], got -0.1"),
        ({"temperature": 0.0}, "temperature: expected 1e-6 or more, got 0.0"),
    ],
)
def test_configs_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ConnectorLossConfig(**changes)
