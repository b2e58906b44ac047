"""info_nce_loss: which key is a query's positive, and pairs of a set with itself."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import assert_matches, features, number
from interpreter import fewer, interpret_only
from torch.testing import assert_close

TARGETS = {
    "permutation": [4, 0, 5, 2, 1, 3],
    "shared keys": [4, 0, 4, 2, 4, 0],
    "one key for all": [7, 7, 7, 7, 7, 7],
    "ignored queries": [4, -100, 4, -100, 1, 0],
    "one of them": [-100, -100, -100, 2, -100, -100],
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_positives_at_targets(target, symmetric, impl):
    interpret_only("shared keys-True", "ignored queries-False")
    op, device = impl
    query, key = features(6, 8, D=5, device=device)
    scale = number(7.0, device)
    target = torch.tensor(target, device=device)
    for reduction in fewer(("mean", "sum", "none")):
        given = {"target": target, "symmetric": symmetric, "reduction": reduction}
        assert_matches(op, query, key, scale, normalize=True, **given)
        given["target"] = target.abs() % 8
        assert_matches(op, query, key, scale, ignore_index=4, **given)
        assert_matches(op, query, key, scale, ignore_index=-1, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_positives_of_random_targets(dtype, impl):
    interpret_only("torch.bfloat16")
    op, device = impl
    query, key = features(40, 70, D=9, device=device, dtype=dtype)
    for keys in fewer((5, 70)):  # many of a key, few of a key; more than one tile of either side
        target = torch.randint(-1, keys, (40,), device=device)
        given = {"target": target, "ignore_index": -1, "normalize": True}
        assert_matches(op, query, key, number(20.0, device), **given)
        assert_matches(op, query, key, number(-5.0, device), reduction="none", **given)


def test_positives_in_another_order(impl):
    op, device = impl
    query, key = features(10, 12, D=6, device=device)
    order = torch.randperm(12, device=device)
    moved = torch.empty_like(key)
    moved[order] = key.detach()
    for actual, expected in zip(
        op(query, moved, target=order[:10], reduction="none"),
        op(query, key, reduction="none"),
        strict=True,
    ):
        wanted = expected if len(expected) == 10 else torch.zeros(12, device=device)
        if len(expected) == 12:
            wanted[order] = expected.detach()
        assert_close(actual, wanted)


def test_a_key_of_two_queries_weighs_each_by_half(impl):
    op, device = impl
    query, key = features(3, 2, D=6, device=device)
    target = torch.tensor([0, 0, 1], device=device)
    _, loss_k = op(query, key, 5.0, target=target, reduction="none")
    logits = 5 * key.detach() @ query.detach().mT
    share = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], device=device)
    assert_close(loss_k, F.cross_entropy(logits, share, reduction="none"))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exclude_self(dtype, symmetric, impl):
    interpret_only("torch.float32-True")
    op, device = impl
    (z,) = features(20, D=9, device=device, dtype=dtype)
    views = torch.arange(20, device=device)
    other = (views + 10) % 20  # two views of each: the self pair left out, the other one positive
    given = {"exclude_self": True, "symmetric": symmetric, "normalize": True}
    x, y = z, z.detach().clone().requires_grad_()
    assert_matches(op, x, y, number(9.0, device), target=other, **given)
    assert_matches(op, x, y, number(9.0, device), target=other, reduction="none", **given)
    (more,) = features(70, D=9, device=device, dtype=dtype)
    ids = {"query_ids": views // 3, "key_ids": torch.arange(70, device=device) // 3}
    for same_id, mask in fewer(
        itertools.product(("ignore", "positive"), (views % 4 != 0, None)), 2
    ):
        given |= {"same_id": same_id, "target_offset": 50, "query_mask": mask}
        assert_matches(op, x, more, number(9.0, device), target=other, **ids, **given)


def test_exclude_self_even_where_it_is_the_target(impl):
    op, device = impl
    query, key = features(5, 5, D=6, device=device)
    loss_q, loss_k = op(query, key, exclude_self=True, reduction="none")
    assert not loss_q.any()
    assert not loss_k.any()
    target = torch.tensor([0, 0, 2, 1, 1], device=device)  # 0 and 2 are themselves
    given = {"target": target, "exclude_self": True, "reduction": "none"}
    loss_q, loss_k = op(query, key, **given)
    assert (loss_q != 0).tolist() == [False, True, False, True, True]
    assert (loss_k != 0).tolist() == [True, True, False, False, False]
    assert_matches(op, query, key, number(9.0, device), **given)


def test_exclude_self_alone_in_its_set(impl):
    op, device = impl
    query, key = features(1, 1, D=6, device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    loss = op(query, key, target=target, exclude_self=True)
    assert loss.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (query, key)))
