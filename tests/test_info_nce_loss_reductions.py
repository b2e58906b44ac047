"""info_nce_loss: label smoothing, weights, and the mean over what is in the loss."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import EPS, assert_matches, features, number
from interpreter import fewer, interpret_only
from torch.testing import assert_close

ALMOST_1 = 1 - 2.0**-10


def masks_of(N, M, device):
    return torch.rand(N, device=device) < 0.7, torch.rand(M, device=device) < 0.7


@pytest.mark.parametrize("smoothing", [0.0, 0.1, ALMOST_1])
@pytest.mark.parametrize("masked", [True, False])
def test_label_smoothing_is_that_of_torch(smoothing, masked, impl):
    interpret_only("True-0.1")
    op, device = impl
    query, key = features(20, 66, D=6, device=device)
    target = torch.randperm(66, device=device)[:20]
    mask = torch.rand(66, device=device) < 0.7 if masked else torch.ones(66).bool().to(device)
    mask[target] = True
    x, y = (t.detach().double().requires_grad_() for t in (query, key))
    theirs = F.cross_entropy(
        9 * x @ y[mask].mT, (mask.cumsum(0) - 1)[target], label_smoothing=smoothing
    )
    given = {"target": target, "key_mask": mask, "symmetric": False}
    loss = op(query, key, 9.0, label_smoothing=smoothing, **given)
    assert_close(loss, theirs.float())
    grads = torch.autograd.grad(loss, (query, key))
    for grad, wanted in zip(grads, torch.autograd.grad(theirs, (x, y)), strict=True):
        assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-6)
    if not masked:
        both = op(query[:, :4], key[:20, :4], 9.0, label_smoothing=smoothing)
        logits = 9 * query[:, :4].double() @ key[:20, :4].double().mT
        own = torch.arange(20, device=device)
        theirs = [F.cross_entropy(z, own, label_smoothing=smoothing) for z in (logits, logits.mT)]
        assert_close(both.double(), sum(theirs) / 2, rtol=1.3e-6, atol=1e-6)


@pytest.mark.parametrize("same_id", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("exclude_self", [True, False])
def test_label_smoothing_with_everything(same_id, exclude_self, impl):
    interpret_only("True-positive")
    op, device = impl
    query, key = features(20, 30, D=6, device=device)
    query_mask, key_mask = masks_of(20, 30, device)
    ids = torch.randint(-2, 6, (50,), device=device).split([20, 30])
    given = {"same_id": same_id, "query_ids": ids[0], "key_ids": ids[1], "label_smoothing": 0.2}
    given |= {"exclude_self": exclude_self, "target_offset": 3}
    scale, weight = number(9.0, device), torch.rand(20, device=device).requires_grad_()
    shared = torch.randint(-1, 5, (20,), device=device)
    for target, symmetric in fewer(itertools.product((None, shared), (True, False))):
        given |= {"target": target, "symmetric": symmetric, "ignore_index": -1}
        assert_matches(op, query, key, scale, normalize=True, **given)
        assert_matches(op, query, key, scale, key_mask=key_mask, weight=weight, **given)
        masks = {"query_mask": query_mask, "key_mask": key_mask}
        assert_matches(op, query, key, scale, reduction="none", **masks, **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_label_smoothing_of_16_bits(dtype, impl):
    interpret_only("torch.bfloat16")
    op, device = impl
    query, key = features(40, 66, D=6, device=device, dtype=dtype)
    given = {"label_smoothing": 0.1, "normalize": True}
    assert_matches(op, query, key, number(14.3, device), **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights(dtype, impl):
    interpret_only("torch.float32")
    op, device = impl
    query, key = features(20, 66, D=6, device=device)
    weight = torch.rand(20, device=device).to(dtype).requires_grad_()
    shared = torch.randint(0, 5, (20,), device=device)
    ids = torch.randint(0, 8, (86,), device=device).split([20, 66])
    by_id = {"query_ids": ids[0], "key_ids": ids[1], "same_id": "positive"}
    query_mask, key_mask = masks_of(20, 66, device)
    cases = [{}, {"target": shared}, by_id, {"target": shared.where(shared > 1, -100), **by_id}]
    cases += [{"query_mask": query_mask, "key_mask": key_mask}, {"symmetric": False}]
    for given, reduction in fewer(itertools.product(cases, ("mean", "sum", "none")), 4):
        scale = number(9.0, device)
        assert_matches(op, query, key, scale, weight=weight, reduction=reduction, **given)


def test_weights_of_any_sign(impl):
    op, device = impl
    query, key = features(6, 8, D=6, device=device)
    for values in fewer(
        [[1.0, 0.0, -2.0, 0.5, 3.0, 0.0], [1.0, -1.0, 1.0, -1.0, 2.0, -2.0], [0.0] * 6]
    ):
        weight = torch.tensor(values, device=device)
        given = {"weight": weight, "reduction": "sum"}
        assert_matches(op, query, key, number(9.0, device), **given)
    assert op(query, key, weight=torch.zeros(6, device=device)).item() == 0  # a mean of nothing
    twice = torch.full((6,), 2.0, device=device)
    assert_close(op(query, key, weight=twice), op(query, key))


def test_weight_of_a_key_is_the_mean_of_its_queries(impl):
    op, device = impl
    query, key = features(4, 5, D=6, device=device)
    target = torch.tensor([2, 2, 0, -100], device=device)
    weight = torch.tensor([1.0, 4.0, 3.0, 7.0], device=device)
    _, plain = op(query, key, target=target, reduction="none")
    _, weighted = op(query, key, target=target, weight=weight, reduction="none")
    of_keys = torch.tensor([3.0, 0.0, 2.5, 0.0, 0.0], device=device)
    assert_close(weighted, plain * of_keys)


@pytest.mark.parametrize("symmetric", [True, False])
def test_reductions_agree(symmetric, impl):
    interpret_only("True")
    op, device = impl
    query, key = features(5, 7, D=4, device=device)
    target = torch.tensor([6, 2, -100, 2, 0], device=device)
    given = {"target": target, "symmetric": symmetric}
    losses = op(query, key, 8.0, reduction="none", **given)
    assert (losses[1] is None) == (not symmetric)
    losses = losses[: 1 + symmetric]
    assert [len(loss) for loss in losses] == [5, 7][: 1 + symmetric]
    total = sum(loss.sum() for loss in losses) / len(losses)
    assert_close(op(query, key, 8.0, reduction="sum", **given), total)
    counts = (4, 3)  # queries and keys that are in the loss
    mean = sum(loss.sum() / n for loss, n in zip(losses, counts, strict=False)) / len(losses)
    assert_close(op(query, key, 8.0, **given), mean, rtol=4 * EPS, atol=0)
