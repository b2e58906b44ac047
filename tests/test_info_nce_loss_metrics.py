"""info_nce_loss: ranks, log-sum-exps and positive logits of the same pass."""

import pickle

import pytest
import torch
from info_nce_cases import entries, features, rounding, rows_of
from interpreter import interpret_only
from torch.testing import assert_close

CASES = {
    "plain": {},
    "normalized": {"normalize": True},
    "one direction": {"symmetric": False},
    "shared": {"target": torch.arange(20) % 7},
    "ignored": {"target": torch.where(torch.arange(20) % 3 == 0, -100, torch.arange(20))},
    "masked": {"query_mask": torch.arange(20) % 3 > 0, "key_mask": torch.arange(70) % 4 > 0},
    "ids ignored": {"same_id": "ignore"},
    "ids positive": {"same_id": "positive"},
    "ids positive, ignored": {"same_id": "positive", "target": -100 + torch.arange(20) // 10 * 105},
    "itself": {"exclude_self": True, "target": (torch.arange(20) + 10) % 20},
}


def given_of(case, device):
    given = dict(CASES[case])
    if "same_id" in given:
        given |= {"query_ids": torch.arange(20) % 6, "key_ids": torch.arange(70) % 9}
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}


def ranked(logits, at_target, negative):
    """Places above the best target, by sorting; the number of columns without one."""
    ranks = []
    for row, target, rest in zip(logits, at_target, negative, strict=True):
        best = row[target].max() if target.any() else None
        higher = row[rest].sort(descending=True).values
        ranks.append(len(row) if best is None else int((higher > best).sum()))
    return torch.tensor(ranks, device=logits.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_metrics(case, dtype, impl):
    interpret_only(
        "shared-torch.float32",
        "masked-torch.bfloat16",
        "ids positive-torch.float32",
        "itself-torch.float32",
    )
    op, device = impl
    query, key = features(20, 70, D=6, device=device, dtype=dtype)
    given = given_of(case, device)
    loss, metrics = op(query, key, 9.0, return_metrics=True, **given)
    assert torch.equal(loss, op(query, key, 9.0, **given))
    x, y = rows_of(query.detach(), key.detach(), **given)
    logits = 9 * x @ y.mT
    near, far = rounding(query, key, 9.0, **given)
    symmetric = given.pop("symmetric", True)
    given.pop("normalize", None)
    absent, positive, at_target, counts = entries(20, 70, device, **given)
    in_loss = positive.any(1) & counts
    negative = ~absent & ~positive
    expected = ranked(logits, at_target & in_loss[:, None], negative)
    assert torch.equal(metrics.rank_q, expected)
    # Of a row that is not in the loss the log-sum-exp is that of its negatives.
    of_row = torch.where(in_loss[:, None], ~absent, negative)
    lse_q = logits.masked_fill(~of_row, -torch.inf).logsumexp(1)
    assert_close(metrics.lse_q.double(), lse_q, rtol=near, atol=far)
    pos = logits.masked_fill(~(positive & in_loss[:, None]), -torch.inf).logsumexp(1)
    assert_close(metrics.pos.double(), torch.where(in_loss, pos, 0), rtol=near, atol=far)
    if symmetric:
        assert torch.equal(metrics.rank_k, ranked(logits.mT, at_target.mT, negative.mT))
        of_column = torch.where(positive.any(0), ~absent, negative)
        lse_k = logits.masked_fill(~of_column, -torch.inf).logsumexp(0)
        assert_close(metrics.lse_k.double(), lse_k, rtol=near, atol=far)
    else:
        assert metrics.rank_k is None
        assert metrics.lse_k is None
    for name, metric in metrics._asdict().items():
        assert metric is None or not metric.requires_grad
        wanted = torch.int64 if name.startswith("rank") else torch.float32
        assert metric is None or metric.dtype == wanted


def test_ranks_do_not_count_ties(impl):
    op, device = impl
    query = torch.eye(3, device=device)
    key = torch.eye(3, device=device)[[0, 0, 2, 2, 1]]
    target = torch.tensor([0, 0, 3], device=device)
    _, metrics = op(query, key, target=target, return_metrics=True)
    # Query 0 ties with key 1, query 1 prefers key 4, and has logits of 0 for the others.
    assert metrics.rank_q.tolist() == [0, 1, 0]
    assert metrics.rank_k.tolist() == [0, 3, 3, 0, 3]


def test_recall_of_perfect_and_opposite_pairs(impl):
    op, device = impl
    (z,) = features(40, D=16, device=device)
    for sign, (first, last) in ((1, (0, 0)), (-1, (39, 39))):
        _, metrics = op(z, sign * z, normalize=True, return_metrics=True)
        for rank in (metrics.rank_q, metrics.rank_k):
            assert (rank.min().item(), rank.max().item()) == (first, last)


def test_metrics_pass_no_gradient_and_pickle(impl):
    op, device = impl
    query, key = features(5, 6, D=4, device=device)
    loss, metrics = op(query, key, return_metrics=True)
    grads = torch.autograd.grad(loss, (query, key))
    wanted = torch.autograd.grad(op(query, key), (query, key))
    assert all(map(torch.equal, grads, wanted))
    again = pickle.loads(pickle.dumps(metrics))
    assert type(again) is type(metrics)
    assert all(map(torch.equal, again, metrics))


def test_metrics_of_nothing(impl):
    op, device = impl
    query, key = features(3, 4, D=4, device=device)
    nobody = torch.zeros(4, dtype=torch.bool, device=device)
    ignored = torch.full((3,), -100, device=device)
    _, metrics = op(query, key, key_mask=nobody, return_metrics=True)
    assert metrics.rank_q.tolist() == [4] * 3
    assert metrics.rank_k.tolist() == [3] * 4
    assert metrics.lse_q.tolist() == [-torch.inf] * 3
    assert metrics.lse_k.tolist() == [-torch.inf] * 4
    _, metrics = op(query, key[:0], target=ignored, return_metrics=True)
    assert metrics.rank_q.tolist() == [0] * 3
    assert metrics.lse_q.tolist() == [-torch.inf] * 3
    _, metrics = op(query[:0], key, return_metrics=True)
    assert metrics.rank_q.shape == metrics.lse_q.shape == metrics.pos.shape == (0,)
    assert metrics.lse_k.tolist() == [-torch.inf] * 4
