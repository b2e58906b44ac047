"""topk_gating: experts chosen within the best groups."""

import pytest
import torch
from topk_gating_cases import (
    ALL,
    INF,
    NAN,
    SCORES,
    assert_outputs,
    differentiable,
    exact,
    gradients,
    ids_of,
)
from torch.testing import assert_close


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("group_score", ["max", "top2_sum", 3])
def test_best_groups(group_score, has_bias, score, impl):
    op, device = impl
    best = {"max": 1, "top2_sum": 2}.get(group_score, group_score)
    # E = 24 in groups of 6, E = 40 of 4 with k at its limit, E = 320 of 40, k more than 16
    for T, E, G, kept, k in ((33, 24, 4, 2, 5), (20, 40, 10, 3, 12), (5, 320, 8, 3, 20)):
        logits = torch.randn(T, E, device=device, requires_grad=True)
        bias = torch.randn(E, device=device) / 2 if has_bias else None
        given = {"n_group": G, "topk_group": kept, "group_score": group_score}
        actual = op(
            logits, k, score_function=score, expert_bias=bias, norm_topk_prob=True, **given, **ALL
        )
        expected = exact(logits, k, score=score, norm=True, bias=bias, groups=(G, kept, best))
        assert_outputs(actual, expected)
        groups = actual.topk_ids // (E // G)
        assert all(len(row.unique()) <= kept for row in groups)
        upstream = [torch.randn_like(x) for x in differentiable(actual)]
        assert_close(
            gradients(actual, upstream, logits)[0], gradients(expected, upstream, logits)[0]
        )


def test_sum_of_as_many_as_a_group_has(impl):
    op, device = impl
    logits = torch.randn(20, 60, device=device)
    given = {"n_group": 3, "topk_group": 1, "group_score": 20, "score_function": "sigmoid"}
    actual = op(logits, 7, **given, **ALL)
    assert_outputs(actual, exact(logits, 7, score="sigmoid", groups=(3, 1, 20)))


def test_all_groups_or_one_are_no_groups(impl):
    op, device = impl
    logits = torch.randn(20, 12, device=device)
    plain = op(logits, 4, **ALL)
    for given in ((3, 3, "max"), (3, 3, "top2_sum"), (1, 1, "max"), (4, 4, 3), (12, 12, "max")):
        names = ("n_group", "topk_group", "group_score")
        grouped = op(logits, 4, **dict(zip(names, given, strict=True)), **ALL)
        assert all(map(torch.equal, plain, grouped))


def test_groups_of_one_expert(impl):
    op, device = impl
    logits = torch.randn(20, 12, device=device)
    plain = op(logits, 11, **ALL)
    grouped = op(logits, 11, n_group=12, topk_group=11, group_score="max", **ALL)
    assert all(map(torch.equal, plain, grouped))
    for k in (4, 3):  # k of the 4 experts that are left
        grouped = op(logits, k, n_group=12, topk_group=4, group_score="max", **ALL)
        assert torch.equal(grouped.topk_ids, plain.topk_ids[:, :k])


def test_ties_go_to_the_lowest_group(impl):
    op, device = impl
    given = {"n_group": 4, "topk_group": 2}
    for group_score in ("max", "top2_sum"):
        zeros = torch.zeros(2, 12, device=device)
        output = op(zeros, 6, group_score=group_score, **given)
        assert output.topk_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    zeros[:, 9:] = 1.0
    assert op(zeros, 6, **given).topk_ids.tolist() == [[9, 10, 11, 0, 1, 2]] * 2
    zeros[0, :3] = -0.0
    assert op(zeros, 4, group_score="max", **given).topk_ids.tolist() == [[9, 10, 11, 0]] * 2


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_groups_with_nan_and_infinity(has_bias, score, impl):
    op, device = impl
    logits = torch.tensor(
        [
            [NAN, NAN, -INF, -INF, -INF, 0.0],  # the last, then -inf before NaN
            [NAN, NAN, NAN, NAN, NAN, NAN],
            [NAN, 3.0, 1.0, 1.0, -INF, -INF],  # NaN adds nothing, and rules nothing out
            [-INF, 9.0, 0.0, 0.0, NAN, 8.0],
        ],
        device=device,
    )
    bias = torch.zeros(6, device=device) if has_bias else None
    given = {"score_function": score, "expert_bias": bias, "n_group": 3, "topk_group": 2}
    by_max = op(logits, 4, group_score="max", nan_policy="zero", **given)
    ids = [[5, 2, 3, 4], [0, 1, 2, 3], [1, 2, 3, 0], [1, 5, 0, 4]]
    assert_close(by_max.topk_ids, ids_of(device, *ids))
    by_sum = op(logits, 4, group_score="top2_sum", nan_policy="zero", **given)
    # softmax and sqrtsoftplus: 9 alone outweighs 0 and 0, and so does 8. sigmoid: it has 1 at most,
    # which is no more than two of 1/2: groups 0 (0.9999) and 1 (1.0) are kept, 2 is not.
    if score == "sigmoid":
        ids[3] = [1, 2, 3, 0]
        ids[2] = [1, 2, 3, 0]
    assert_close(by_sum.topk_ids, ids_of(device, *ids))
    assert not by_sum.topk_weights[1].any()
    assert by_sum.topk_weights.isfinite().all()
    nan = op(logits, 4, group_score="max", **given)
    assert torch.equal(nan.topk_ids, by_max.topk_ids)
    assert nan.topk_weights.isnan().all()


def test_a_group_that_its_bias_rules_out(impl):
    op, device = impl
    logits = torch.zeros(1, 6, device=device)
    bias = torch.tensor([NAN, NAN, 0.0, 0.0, -INF, -INF], device=device)
    output = op(logits, 4, expert_bias=bias, n_group=3, topk_group=2, score_function="sigmoid")
    assert output.topk_ids.tolist() == [[2, 3, 4, 5]]
