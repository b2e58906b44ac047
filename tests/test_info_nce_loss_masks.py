"""info_nce_loss: rows that are absent, rows that are ignored, rows that hold NaN."""

import itertools
import math

import pytest
import torch
from info_nce_cases import assert_matches, features, number
from interpreter import fewer, interpret_only
from torch.testing import assert_close


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_masks_at_random(symmetric, normalize, impl):
    interpret_only("True-True")
    op, device = impl
    (N, M), scale = (24, 70), number(9.0, device)
    given = {"symmetric": symmetric, "normalize": normalize}
    for probability in fewer((0.5, 0.1, 0.9)):
        query, key = features(N, M, D=7, device=device)
        query_mask = torch.rand(N, device=device) < probability
        key_mask = torch.rand(M, device=device) < probability
        repeated = torch.randint(0, 10, (N,), device=device)
        for target in (None, repeated):
            masks = {"query_mask": query_mask, "key_mask": key_mask, "target": target}
            assert_matches(op, query, key, scale, **masks, **given)
        assert_matches(op, query, key, scale, query_mask=query_mask, **given)
        assert_matches(op, query, key, scale, key_mask=key_mask, reduction="none", **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masks_of_16_bits(dtype, impl):
    interpret_only("torch.bfloat16")
    op, device = impl
    query, key = features(40, 70, D=7, device=device, dtype=dtype)
    masks = {"query_mask": torch.rand(40) < 0.5, "key_mask": torch.rand(70) < 0.5}
    masks = {name: mask.to(device) for name, mask in masks.items()}
    assert_matches(op, query, key, number(9.0, device), normalize=True, **masks)


def test_masks_equal_compaction(impl):
    op, device = impl
    query, key = features(30, 30, D=7, device=device)
    query_mask, key_mask = torch.rand(2, 30, device=device) < 0.6
    loss_q, loss_k = op(query, key, query_mask=query_mask, key_mask=key_mask, reduction="none")
    # Of what is left: query i's key, if it is left, is at another place.
    place = key_mask.cumsum(0) - 1
    target = torch.where(key_mask, place, -100)[query_mask]
    left_q, left_k = op(query[query_mask], key[key_mask], target=target, reduction="none")
    both = query_mask & key_mask
    assert_close(loss_q[both], left_q[key_mask[query_mask]])
    assert_close(loss_k[both], left_k[query_mask[key_mask]])
    assert not loss_q[~both].any()
    assert not loss_k[~both].any()


@pytest.mark.parametrize("normalize", [True, False])
def test_empty_masks(normalize, impl):
    interpret_only("True")
    op, device = impl
    query, key = features(3, 4, D=8, device=device)
    scale = number(10.0, device)
    nobody = torch.zeros(4, dtype=torch.bool, device=device)
    empty = [
        {"query_mask": nobody[:3]},
        {"key_mask": nobody},
        {"query_mask": nobody[:3], "key_mask": nobody},
        {"query_mask": nobody[:3], "target": torch.tensor([1, 1, -100], device=device)},
        {"key_mask": nobody, "label_smoothing": 0.1},
        {"key_mask": nobody, "symmetric": False},
        # somebody is there, but nobody's pair
        {"query_mask": ~nobody[:3] & (torch.arange(3, device=device) == 0), "target_offset": 1}
        | {"key_mask": torch.arange(4, device=device) != 1},
    ]
    for masks, reduction in itertools.product(empty, fewer(("none", "mean", "sum"))):
        losses = op(query, key, scale, normalize=normalize, reduction=reduction, **masks)
        losses = losses if reduction == "none" else (losses,)
        losses = [loss for loss in losses if loss is not None]
        assert not any(loss.any() for loss in losses)
        grads = torch.autograd.grad(losses, (query, key, scale), list(map(torch.ones_like, losses)))
        assert not any(grad.any() for grad in grads)


def test_query_whose_key_is_masked_has_no_loss_and_stays_a_negative(impl):
    op, device = impl
    query, key = features(5, 5, D=6, device=device)
    mask = torch.tensor([True, True, False, True, True], device=device)
    loss_q, loss_k = op(query, key, key_mask=mask, reduction="none")
    assert loss_q[2] == 0
    assert loss_k[2] == 0
    _, without = op(query, key, key_mask=mask, query_mask=mask, reduction="none")
    assert (loss_k[mask] > without[mask]).all()
    mean = op(query, key, key_mask=mask)
    assert_close(mean, (loss_q.sum() / 4 + loss_k.sum() / 4) / 2)  # over the 4 that are in the loss


def test_ignored_query_is_a_negative_and_masked_one_is_not(impl):
    op, device = impl
    # Masked samples that stay negatives, as in torchmultimodal's contrastive loss, are ignore_index
    query, key = features(4, 4, D=5, device=device)
    target = torch.tensor([0, -100, 2, 3], device=device)
    mask = target != -100
    ignored, masked = op(query, key, target=target), op(query, key, query_mask=mask)
    assert (ignored - masked).abs() > 1e-3
    logits = query.detach().double() @ key.detach().double().mT / 0.07
    theirs = [(z.logsumexp(1) - z.diag())[mask].mean() for z in (logits, logits.mT)]
    assert_close(ignored.double(), sum(theirs) / 2, rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(ignored, query)
    assert grad[1].any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_absent_rows_may_hold_anything(dtype, garbage, impl):
    interpret_only("torch.float32-nan", "torch.float16-inf")
    op, device = impl
    query, key = features(6, 70, D=5, device=device, dtype=dtype)
    scale = number(9.0, device)
    query_mask = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool, device=device)
    key_mask = torch.arange(70, device=device) != 2
    ids = torch.arange(70, device=device) % 3
    ids = {"query_ids": ids[:6], "key_ids": ids}
    options = [{"normalize": True}, {}, {"label_smoothing": 0.1}, {"return_metrics": True}]
    options += [{"same_id": "ignore", **ids}, {"same_id": "positive", "normalize": True, **ids}]
    dirty = [query.detach().clone(), key.detach().clone()]
    dirty[0][1], dirty[1][2] = garbage, garbage
    dirty = [t.requires_grad_() for t in dirty]
    for given in fewer(reversed(options), 2):
        given = {"query_mask": query_mask, "key_mask": key_mask, **given}
        results = []
        for x, y in ((query, key), dirty):
            loss = op(x, y, scale, **given)
            loss, metrics = loss if isinstance(loss, tuple) else (loss, ())
            results.append((loss, *metrics, *torch.autograd.grad(loss, (x, y, scale))))
        assert all(map(torch.equal, *results)), given
        *_, grad_q, grad_k, _ = results[1]
        assert not grad_q[1].any()
        assert not grad_k[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_spreads_only_as_in_torch(dtype, impl):
    interpret_only("torch.float32")
    op, device = impl
    query, key = features(4, 70, D=5, device=device, dtype=dtype)
    query.detach()[1, 2] = math.nan
    loss_q, loss_k = op(query, key, reduction="none")
    # That query's loss; and through their sums those of all keys that have one.
    assert loss_q.isnan().tolist() == [False, True, False, False]
    assert loss_k.isnan().tolist() == [True] * 4 + [False] * 66
    rest = torch.tensor([0, 2, 3], device=device)
    assert_close(loss_q[rest], op(query[rest], key, target=rest, reduction="none")[0])
    loss_q, _ = op(query, key, reduction="none", symmetric=False)
    grads = torch.autograd.grad(loss_q, (query, key), torch.ones_like(loss_q))
    assert grads[0].isnan().any(1).tolist() == [False, True, False, False]
    assert grads[1].isnan().all()
    mask = torch.tensor([True, True, True, False], device=device)
    for normalize in (True, False):
        loss = op(query, key[:4], query_mask=mask, key_mask=mask, normalize=normalize)
        assert loss.isnan()
        grads = torch.autograd.grad(loss, (query, key))
        assert not any(grad[3].any() for grad in grads)  # but not into a row that is absent


def test_nan_spreads_only_from_what_is_present(impl):
    op, device = impl
    # The NaN of a key that only query 2 sees: of one id with all others, which leave it out.
    query, key = features(4, 5, D=5, device=device)
    key.detach()[4] = math.nan
    ids = torch.tensor([7, 7, 8, 7], device=device)
    key_ids = torch.tensor([0, 1, 2, 3, 7], device=device)
    given = {"query_ids": ids, "key_ids": key_ids, "same_id": "ignore", "reduction": "none"}
    losses = op(query, key, **given)
    assert losses[0].isnan().tolist() == [False, False, True, False]
    assert not losses[1].isnan().any()
    for scale in (math.nan, math.inf):
        loss = op(query[:, :3], key[:4, :3], scale)
        assert not loss.isfinite()


def test_infinite_features_spread_as_in_torch(impl):
    op, device = impl
    query, key = (torch.rand(4, 5, device=device) for _ in range(2))
    key[2, 1] = math.inf  # logits of +inf in column 2
    loss_q, _ = op(query, key, reduction="none")
    logits = (query @ key.mT) / 0.07
    theirs = logits.logsumexp(1) - logits.diag()
    assert not theirs.isfinite().any()  # of query 2 it is inf - inf; here that may be 0
    assert not loss_q[[0, 1, 3]].isfinite().any()
    loss_q, loss_k = op(query, -key, reduction="none")  # -inf: of probability 0
    theirs = (-logits).logsumexp(1) + logits.diag()
    assert_close(loss_q[[0, 1, 3]], theirs[[0, 1, 3]])
    assert not loss_q[2].isfinite()
    assert loss_k[[0, 1, 3]].isfinite().all()
