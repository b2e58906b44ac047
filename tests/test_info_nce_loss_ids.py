"""info_nce_loss: pairs of one id, ignored or positive, like any other or like the target."""

import math

import pytest
import torch
from info_nce_cases import assert_matches, features, number
from interpreter import fewer, interpret_only
from torch.testing import assert_close


def ids_of(kind, N, M, device):
    if kind == "equal":
        return torch.full((N,), 3, device=device), torch.full((M,), 3, device=device)
    if kind == "single":
        return torch.arange(N, device=device), torch.arange(M, device=device)
    if kind == "large":  # that differ in the upper half of 64 bits alone
        few = torch.randint(0, 3, (N + M,), device=device) << 40
        return (few - 2**62).split([N, M])
    return torch.randint(-4, 5, (N + M,), device=device).split([N, M])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("same_id", ["ignore", "positive"])
@pytest.mark.parametrize("kind", ["equal", "single", "random", "large"])
def test_ids(kind, same_id, symmetric, impl):
    interpret_only("random-ignore-True", "random-positive-True", "large-positive-False")
    op, device = impl
    N, M = 18, 70
    query, key = features(N, M, D=6, device=device)
    query_ids, key_ids = ids_of(kind, N, M, device)
    given = {"query_ids": query_ids, "key_ids": key_ids, "same_id": same_id, "symmetric": symmetric}
    scale = number(6.0, device)
    targets = {
        "shared": torch.randint(0, M, (N,), device=device) % 7,
        "diagonal": None,
        "some": torch.where(torch.arange(N, device=device) % 3 == 0, -100, 5),
    }
    for target in fewer(targets.values()):
        assert_matches(op, query, key, scale, target=target, normalize=True, **given)
        assert_matches(op, query, key, scale, target=target, reduction="none", **given)


@pytest.mark.parametrize("same_id", ["ignore", "positive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ids_of_16_bits(dtype, same_id, impl):
    interpret_only("torch.bfloat16-positive", "torch.float16-ignore")
    op, device = impl
    query, key = features(40, 66, D=6, device=device, dtype=dtype)
    query_ids, key_ids = ids_of("random", 40, 66, device)
    given = {"query_ids": query_ids, "key_ids": key_ids, "same_id": same_id, "normalize": True}
    assert_matches(op, query, key, number(14.3, device), **given)
    assert_matches(op, query, key, number(14.3, device), reduction="none", **given)


@pytest.mark.parametrize("same_id", ["ignore", "positive"])
def test_ids_with_masks_and_without_oneself(same_id, impl):
    interpret_only("positive")
    op, device = impl
    query, key = features(30, 40, D=6, device=device)
    query_ids, key_ids = ids_of("random", 30, 40, device)
    given = {"query_ids": query_ids, "key_ids": key_ids, "same_id": same_id}
    masks = {"query_mask": torch.rand(30) < 0.7, "key_mask": torch.rand(40) < 0.7}
    given |= {name: mask.to(device) for name, mask in masks.items()}
    scale = number(9.0, device)
    target = torch.randint(0, 40, (30,), device=device)
    for more in fewer(({"exclude_self": True, "target_offset": 4}, {"target": target}, {})):
        assert_matches(op, query, key, scale, **given, **more)
        assert_matches(op, query, key, scale, reduction="none", normalize=True, **given, **more)


def test_ids_that_occur_once_change_nothing(impl):
    op, device = impl
    query, key = features(12, 20, D=6, device=device)
    ids = {"query_ids": torch.arange(12, device=device), "key_ids": torch.arange(20, device=device)}
    plain = op(query, key, reduction="none")
    for same_id in ("negative", "ignore", "positive"):
        for loss, wanted in zip(
            op(query, key, reduction="none", same_id=same_id, **ids), plain, strict=True
        ):
            assert_close(loss, wanted)
    same = torch.zeros(20, dtype=torch.int64, device=device)
    equal = op(query, key, query_ids=same[:12], key_ids=same, same_id="negative", reduction="none")
    assert all(map(torch.equal, equal, plain))


def test_ids_that_are_all_equal(impl):
    op, device = impl
    query, key = features(12, 20, D=6, device=device)
    same = torch.zeros(20, dtype=torch.int64, device=device)
    given = {"query_ids": same[:12], "key_ids": same, "reduction": "none"}
    loss_q, loss_k = op(query, key, same_id="ignore", **given)  # of each nothing but its target
    assert not loss_q.any()
    assert not loss_k.any()
    loss_q, loss_k = op(query, key, 0.0, same_id="positive", **given)
    assert_close(loss_q, torch.full((12,), math.log(20), device=device))
    assert_close(loss_k, torch.full((20,), math.log(12), device=device))  # also beyond the targets


def test_ids_make_positives_of_keys_through_ignored_queries(impl):
    op, device = impl
    query, key = features(3, 4, D=6, device=device)
    ids = {"query_ids": torch.tensor([5, 6, 7]), "key_ids": torch.tensor([0, 1, 5, 9])}
    ids = {name: tensor.to(device) for name, tensor in ids.items()}
    target = torch.tensor([-100, 1, -100], device=device)
    given = {"target": target, "same_id": "positive", "reduction": "none", **ids}
    loss_q, loss_k = op(query, key, **given)
    assert (loss_q != 0).tolist() == [False, True, False]
    assert (loss_k != 0).tolist() == [False, True, True, False]
    assert_matches(op, query, key, number(9.0, device), **given)


def test_ids_that_ignore_drop_false_negatives(impl):
    op, device = impl
    query, key = features(4, 4, D=6, device=device)
    ids = torch.tensor([0, 1, 0, 3], device=device)
    loss_q, _ = op(query, key, same_id="ignore", query_ids=ids, key_ids=ids, reduction="none")
    keep = torch.tensor([True, True, False, True], device=device)
    without, _ = op(query, key, key_mask=keep, reduction="none")
    assert_close(loss_q[0], without[0])
    assert loss_q[0] < op(query, key, reduction="none")[0][0]
