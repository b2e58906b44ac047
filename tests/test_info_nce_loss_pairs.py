"""info_nce_loss: which query belongs to which key, and what is absent."""

import math

import pytest
import torch
from test_info_nce_loss import assert_matches, exact, features
from torch.testing import assert_close

TARGETS = {
    "permutation": [4, 0, 5, 2, 1, 3],
    "shared keys": [4, 0, 4, 2, 4, 0],
    "ignored queries": [4, -100, 4, -100, 1, 0],
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_targets(target, symmetric, impl):
    op, device = impl
    query, key = features(6, 8, D=5, device=device)
    scale = torch.tensor(7.0, device=device, requires_grad=True)
    target = torch.tensor(target, device=device)
    for reduction in ("mean", "sum"):
        given = {"target": target, "symmetric": symmetric, "reduction": reduction}
        assert_matches(op, query, key, scale, normalize=True, **given)
        assert_matches(
            op, query, key, scale, ignore_index=4, **given | {"target": target.abs() % 8}
        )


def test_ignored_query_is_a_negative_and_masked_one_is_not(impl):
    op, device = impl
    query, key = features(4, 4, D=5, device=device)
    target = torch.tensor([0, -100, 2, 3], device=device)
    mask = target != -100
    ignored, masked = op(query, key, target=target), op(query, key, query_mask=mask)
    assert (ignored - masked).abs() > 1e-3
    assert_close(ignored, exact(query, key, 1 / 0.07, target=target).float())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_masks_equal_compaction(symmetric, normalize, impl):
    op, device = impl
    (N, M), scale = (24, 30), torch.tensor(9.0, device=device, requires_grad=True)
    given = {"symmetric": symmetric, "normalize": normalize}
    for probability in (0.3, 0.7):
        query, key = features(N, M, D=7, device=device)
        query_mask = torch.rand(N, device=device) < probability
        key_mask = torch.rand(M, device=device) < probability
        repeated = torch.randint(0, 10, (N,), device=device)
        for target in (None, repeated):
            masks = {"query_mask": query_mask, "key_mask": key_mask, "target": target}
            assert_matches(op, query, key, scale, **masks, **given)
        assert_matches(op, query, key, scale, query_mask=query_mask, **given)
        assert_matches(op, query, key, scale, key_mask=key_mask, **given)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_absent_rows_may_hold_anything(garbage, impl):
    op, device = impl
    query, key = features(6, 6, D=5, device=device)
    scale = torch.tensor(9.0, device=device, requires_grad=True)
    query_mask = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool, device=device)
    key_mask = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool, device=device)
    for normalize in (True, False):
        given = {"query_mask": query_mask, "key_mask": key_mask, "normalize": normalize}
        expected = op(query, key, scale, **given)
        wanted = torch.autograd.grad(expected, (query, key, scale))
        dirty = [query.detach().clone(), key.detach().clone()]
        dirty[0][1], dirty[1][2] = garbage, garbage
        dirty = [t.requires_grad_() for t in dirty]
        loss = op(*dirty, scale, **given)
        grads = torch.autograd.grad(loss, (*dirty, scale))
        assert torch.equal(loss, expected)
        assert all(map(torch.equal, grads, wanted))
        assert not grads[0][1].any()
        assert not grads[1][2].any()


def test_nan_that_is_present_spreads(impl):
    op, device = impl
    query, key = features(4, 4, D=5, device=device)
    with torch.no_grad():
        query[1, 2] = math.nan
    loss_q, loss_k = op(query, key, reduction="none")
    assert loss_q.isnan().tolist() == [False, True, False, False]
    assert loss_k.isnan().all()
    mask = torch.tensor([True, True, True, False], device=device)
    for normalize in (True, False):
        loss = op(query, key, query_mask=mask, key_mask=mask, normalize=normalize)
        grads = torch.autograd.grad(loss, (query, key))
        assert not any(grad[3].any() for grad in grads)  # but not into a row that is absent
