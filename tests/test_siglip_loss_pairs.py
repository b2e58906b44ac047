"""siglip_loss: which image and text are a pair, and which entries are absent."""

import itertools
import math

import pytest
import torch
from test_siglip_loss import assert_matches, exact, features, numbers
from torch.testing import assert_close

TARGETS = {
    "permutation": [4, 0, 5, 2, 1, 3],
    "shared texts": [4, 0, 4, 2, 4, 0],
    "images without a pair": [4, -100, 4, -100, 1, 0],
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_targets(target, reduction, impl):
    op, device = impl
    inputs = *features(6, 8, D=5, device=device), *numbers(7.0, -2.0, device=device)
    target = torch.tensor(target, device=device)
    given = {"target": target, "normalize": True, "reduction": reduction}
    assert_matches(op, *inputs, **given)
    assert_matches(op, *inputs, ignore_index=4, **given | {"target": target.abs() % 8})


def test_image_without_a_pair_is_a_negative_and_masked_one_is_not(impl):
    op, device = impl
    inputs = *features(4, 4, D=5, device=device), 5.0, -1.0
    target = torch.tensor([0, -100, 2, 3], device=device)
    given = {"target": target, "reduction": "sum"}
    without, masked = op(*inputs, **given), op(*inputs, query_mask=target != -100, **given)
    assert without - masked > 1e-2
    assert_close(without, exact(*inputs, **given).float())


@pytest.mark.parametrize("same_id", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("groups", [1, 3, 1000], ids=["all equal", "few", "all different"])
def test_ids(groups, same_id, impl):
    op, device = impl
    inputs = *features(20, 30, D=5, device=device), *numbers(7.0, -2.0, device=device)
    query_ids = torch.randint(-groups, groups, (20,), device=device) // 2 * 2**40  # beyond int32
    key_ids = torch.randint(-groups, groups, (30,), device=device) // 2 * 2**40
    targets = torch.randint(0, 30, (20,), device=device)
    targets[::4] = -100
    given = {"query_ids": query_ids, "key_ids": key_ids, "same_id": same_id}
    masks = {
        "query_mask": query_ids.new_ones(20).bool(),
        "key_mask": torch.rand(30, device=device) < 0.6,
    }
    for target, reduction in itertools.product((None, targets), ("mean", "none")):
        assert_matches(op, *inputs, target=target, reduction=reduction, **given)
        assert_matches(op, *inputs, target=target, reduction=reduction, **given, **masks)


def test_ids_all_alike_and_all_different(impl):
    op, device = impl
    inputs = *features(6, 6, D=5, device=device), 7.0, -2.0
    alike, own = torch.zeros(6, dtype=torch.int64, device=device), torch.arange(6, device=device)
    for same_id in ("ignore", "positive"):
        given = {"query_ids": own, "key_ids": own, "same_id": same_id}
        assert_close(op(*inputs, **given), op(*inputs))
    given = {"query_ids": alike, "key_ids": alike}
    only_pairs = torch.stack(
        [op(x[None], y[None], 7.0, -2.0) for x, y in zip(*inputs[:2], strict=True)]
    )
    assert_close(op(*inputs, same_id="ignore", **given), only_pairs.mean())
    minus = (-inputs[0], inputs[1], 7.0, 2.0)  # l to -l, so pairs to negatives
    nobody = torch.full((6,), -100, device=device)
    assert_close(op(*inputs, same_id="positive", **given), op(*minus, target=nobody))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masks_equal_compaction(reduction, normalize, impl):
    op, device = impl
    (N, M), given = (24, 30), {"reduction": reduction, "normalize": normalize}
    for probability in (0.3, 0.7):
        inputs = *features(N, M, D=7, device=device), *numbers(9.0, -3.0, device=device)
        query_mask = torch.rand(N, device=device) < probability
        key_mask = torch.rand(M, device=device) < probability
        repeated = torch.randint(0, 10, (N,), device=device)
        weight = torch.rand(N, device=device)
        for target in (None, repeated):
            masks = {"query_mask": query_mask, "key_mask": key_mask, "target": target}
            assert_matches(op, *inputs, **masks, **given)
        assert_matches(op, *inputs, query_mask=query_mask, weight=weight, **given)
        assert_matches(op, *inputs, key_mask=key_mask, **given)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_absent_rows_may_hold_anything(garbage, reduction, impl):
    op, device = impl
    inputs = *features(6, 6, D=5, device=device), *numbers(9.0, -3.0, device=device)
    query_mask = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool, device=device)
    key_mask = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool, device=device)
    masks = {"query_mask": query_mask, "key_mask": key_mask, "reduction": reduction}
    upstream = torch.randn(6, device=device)
    for normalize in (True, False):
        given = {"normalize": normalize, **masks}
        weight = torch.rand(6, device=device)
        expected = op(*inputs, weight=weight, **given)
        wanted = torch.autograd.grad((expected * upstream).sum(), inputs)
        dirty = [t.detach().clone() for t in (*inputs[:2], weight)]
        dirty[0][1], dirty[1][2], dirty[2][1] = garbage, garbage, garbage
        images, texts = (t.requires_grad_() for t in dirty[:2])
        loss = op(images, texts, *inputs[2:], weight=dirty[2], **given)
        grads = torch.autograd.grad((loss * upstream).sum(), (images, texts, *inputs[2:]))
        assert torch.equal(loss, expected)
        assert all(map(torch.equal, grads, wanted))
        assert not grads[0][1].any()
        assert not grads[1][2].any()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nan_that_is_present_spreads(reduction, impl):
    op, device = impl
    images, texts = features(4, 4, D=5, device=device)
    with torch.no_grad():
        images[1, 2] = math.nan
    losses = op(images, texts, 9.0, -3.0, reduction="none")
    assert losses.isnan().tolist() == [False, True, False, False]
    assert op(images, texts, 9.0, -3.0).isnan()
    mask = torch.tensor([True, True, True, False], device=device)
    for normalize in (True, False):
        given = {
            "query_mask": mask,
            "key_mask": mask,
            "normalize": normalize,
            "reduction": reduction,
        }
        grads = torch.autograd.grad(op(images, texts, 9.0, -3.0, **given).sum(), (images, texts))
        assert not any(grad[3].any() for grad in grads)  # but not into a row that is absent
        assert grads[0][1].isnan().any()
        assert not grads[0][0].isnan().any()  # and each image has its own entries
