"""The reference of info_nce_loss, by which kernels are defined: loops, and its own gradients."""

import random

import pytest
import torch
from info_nce_cases import exact, features
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from m2ae_kernels import info_nce_loss, reference


def kind_of(i, j, given):
    """What query i and key j are: absent, a positive, or a negative."""
    itself = j == i + given["target_offset"]
    if not given["query_mask"][i] or not given["key_mask"][j] or (given["exclude_self"] and itself):
        return "absent"
    if (itself if given["target"] is None else given["target"][i] == j) and wanted(i, given):
        return "positive"
    if given["query_ids"][i] == given["key_ids"][j]:
        return {"ignore": "absent"}.get(given["same_id"], given["same_id"])
    return "negative"


def wanted(i, given):
    return given["target"] is None or given["target"][i] != given["ignore_index"]


def loss_of_row(logits, kinds, smoothing):
    """Cross entropy over what is present, against an even share of the positives; or None."""
    present = [z for z, kind in zip(logits, kinds, strict=True) if kind != "absent"]
    positive = [z for z, kind in zip(logits, kinds, strict=True) if kind == "positive"]
    if not positive:
        return None
    total = torch.stack(present).logsumexp(0)
    of_positive = sum(total - z for z in positive) / len(positive)
    of_all = sum(total - z for z in present) / len(present)
    return (1 - smoothing) * of_positive + smoothing * of_all


def by_loops(query, key, scale, weight, label_smoothing, **given):
    """The mean over queries plus that over keys, halved; entry by entry."""
    logits = scale * query @ key.mT
    N, M = logits.shape
    kinds = [[kind_of(i, j, given) for j in range(M)] for i in range(N)]
    nothing = (logits.sum() + weight.sum()) * 0
    loss = nothing
    losses, weights = [nothing], []
    for i in range(N):
        row = loss_of_row(logits[i], kinds[i], label_smoothing) if wanted(i, given) else None
        if row is not None:
            losses.append(row * weight[i])
            weights.append(weight[i])
    loss = sum(losses) / (sum(weights) if weights else 1)
    losses, weights = [nothing], []
    for j in range(M):
        of_key = [row[j] for row in kinds]
        column = loss_of_row(logits[:, j], of_key, label_smoothing)
        if column is not None:
            own = [weight[i] for i in range(N) if of_key[i] == "positive"]
            weights.append(sum(own) / len(own))
            losses.append(column * weights[-1])
    return (loss + sum(losses) / (sum(weights) if weights else 1)) / 2


def random_case():
    N, M = random.randint(1, 6), random.randint(1, 7)
    offset = random.randint(0, max(M - N, 0))
    fits = N + offset <= M
    columns = [*range(M), -7]
    target = torch.tensor([random.choice(columns) for _ in range(N)])
    inputs = [torch.randn(size, 3, dtype=torch.float64) for size in (N, M)]
    inputs.append(torch.tensor(random.choice([0.0, 1.0, -2.0, 5.0]), dtype=torch.float64))
    inputs.append(torch.rand(N, dtype=torch.float64) + 0.1)
    return [t.requires_grad_() for t in inputs], {
        "target": None if fits and random.random() < 0.5 else target,
        "target_offset": offset,
        "ignore_index": -7,
        "query_mask": torch.rand(N) < 0.8,
        "key_mask": torch.rand(M) < 0.8,
        "query_ids": torch.randint(-2, 2, (N,)),
        "key_ids": torch.randint(-2, 2, (M,)),
        "same_id": random.choice(["negative", "ignore", "positive"]),
        "exclude_self": fits and random.random() < 0.3,
        "label_smoothing": random.choice([0.0, 0.1, 0.6]),
    }


def test_reference_is_what_loops_say():
    random.seed(0)
    losses = []
    for _ in range(250):
        (query, key, scale, weight), given = random_case()
        inputs = (query, key, scale, weight)
        expected = by_loops(*inputs, **given)
        wanted = torch.autograd.grad(expected, inputs)
        loss = reference.info_nce_loss(query, key, scale, weight=weight, **given)
        assert_close(loss, expected)
        for grad, right in zip(torch.autograd.grad(loss, inputs), wanted, strict=True):
            assert_close(grad, right, atol=1e-9, rtol=1e-7)
        # What the other tests compare with says the same.
        assert_close(exact(query, key, scale, weight=weight, **given), expected)
        losses.append(loss.item())
    assert sum(loss > 0 for loss in losses) > 150


CASES = {
    "plain": {},
    "normalized": {"normalize": True},
    "targets": {"target": torch.tensor([1, 1, -100, 3]), "key_mask": torch.arange(5) != 2},
    "positive ids": {
        "query_ids": torch.tensor([0, 1, 1, 0]),
        "key_ids": torch.tensor([0, 1, 0, 0, 5]),
        "same_id": "positive",
        "normalize": True,
    },
    "ignored ids": {
        "query_ids": torch.tensor([0, 1, 1, 0]),
        "key_ids": torch.tensor([0, 1, 0, 0, 5]),
        "same_id": "ignore",
        "label_smoothing": 0.1,
    },
    "itself": {"exclude_self": True, "target": torch.tensor([1, 0, 3, 2]), "symmetric": False},
}


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_reference_gradients_and_their_gradients(given):
    query, key = (t.detach().double().requires_grad_() for t in features(4, 5, D=3))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, dtype=torch.float64).requires_grad_()

    def losses(query, key, scale, weight):
        loss = reference.info_nce_loss(query, key, scale, weight=weight, reduction="none", **given)
        return tuple(side for side in loss if side is not None)

    assert gradcheck(losses, (query, key, scale, weight))
    assert gradgradcheck(losses, (query, key, scale, weight))


@pytest.mark.parametrize("normalize", [True, False])
def test_reference_gradients_where_there_is_no_negative(normalize):
    query, key = features(3, 3, D=4)
    scale = torch.tensor(9.0, requires_grad=True)
    alone = torch.tensor([True, False, False])
    for mask in (alone, ~alone, torch.zeros(3, dtype=torch.bool)):
        for masks in ({"query_mask": mask}, {"key_mask": mask, "query_mask": mask}):
            grads = []
            for op in (reference.info_nce_loss, info_nce_loss):
                loss = op(query, key, scale, normalize=normalize, **masks)
                grads.append(torch.autograd.grad(loss, (query, key, scale)))
            for actual, expected in zip(*grads, strict=True):
                assert_close(actual, expected)
    for given in ({"query": query[:0]}, {"query": query[:1], "key": key[:1]}):
        inputs = {"query": query, "key": key, "normalize": normalize} | given
        loss = reference.info_nce_loss(logit_scale=scale, **inputs)
        assert loss.item() == 0
        assert not any(grad.any() for grad in torch.autograd.grad(loss, (query, key, scale)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_reference_in_float64(symmetric):
    query, key = (t.detach().double() for t in features(8, 9, D=5))
    target = torch.tensor([1, 1, -100, 3, 8, 8, 8, 0])
    given = {"target": target, "normalize": True, "symmetric": symmetric}
    loss = reference.info_nce_loss(query, key, 14.3, **given)
    assert loss.dtype == torch.float64
    assert_close(loss, exact(query, key, 14.3, **given))
    _, metrics = reference.info_nce_loss(query, key, 14.3, return_metrics=True, **given)
    assert metrics.lse_q.dtype == metrics.pos.dtype == torch.float64
