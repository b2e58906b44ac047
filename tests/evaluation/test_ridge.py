"""Ridge regression against its normal equations, and the orders of the control."""

import pytest
import torch
from torch.testing import assert_close

from m2ae.evaluation.ridge import PENALTIES, Ridge, choose_penalty, shuffled_within, unit

n, D, K = 30, 6, 4


def data(noise=0.1):
    x = 2 + torch.randn(n, D)
    y = x @ torch.randn(D, K) - 3 + noise * torch.randn(n, K)
    return x, y


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
def test_solves_the_normal_equations(penalty):
    x, y = data()
    queries = torch.randn(5, D)
    x64, y64 = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    gram = x64.T @ x64
    weight = torch.linalg.solve(gram + penalty * gram.diagonal().mean() * torch.eye(D), x64.T @ y64)
    wanted = (queries.double() - x.double().mean(0)) @ weight + y.double().mean(0)
    assert_close(Ridge(x).fit(y).predict(penalty, queries), wanted)


def test_more_inputs_than_items_is_fine():
    x, y = torch.randn(5, 20), torch.randn(5, K)
    assert_close(Ridge(x).fit(y).predict(1e-9, x), y.double(), rtol=1e-6, atol=1e-6)  # interpolates


def test_a_huge_penalty_leaves_the_mean():
    x, y = data()
    predicted = Ridge(x).fit(y).predict(1e12, x)
    assert_close(predicted, y.double().mean(0).expand(n, K), rtol=1e-6, atol=1e-6)


def test_the_penalty_is_chosen_on_validation_items():
    torch.manual_seed(2)
    weight = torch.randn(40, K)

    def pairs(items):
        x = torch.randn(items, 40)
        return x, x @ weight + 4 * torch.randn(items, K)

    (x, y), (queries, keys) = pairs(50), pairs(300)
    fit = Ridge(x).fit(y)
    chosen = choose_penalty(fit, queries, keys)

    def reciprocal_rank(penalty):
        scores = unit(fit.predict(penalty, queries)) @ unit(keys.double()).T
        rank = (scores >= scores.diagonal()[:, None]).sum(1)
        return (1 / rank).mean().item()

    quality = {penalty: reciprocal_rank(penalty) for penalty in PENALTIES}
    assert quality[chosen] == pytest.approx(max(quality.values()))
    assert PENALTIES[0] < chosen < PENALTIES[-1]  # noise: neither end is best


def test_an_order_stays_inside_categories_and_depends_on_its_seed():
    labels = ["a", "b", "a", "c", "b", "a"] * 20
    order = shuffled_within(labels, seed=0)
    assert sorted(order.tolist()) == list(range(len(labels)))
    assert [labels[row] for row in order] == labels
    moved = (order != torch.arange(len(labels))).float().mean()
    assert moved > 0.8  # of rows of categories of 20, 40 and 60: 1/20 stays at most, on average
    assert torch.equal(order, shuffled_within(labels, seed=0))
    assert not torch.equal(order, shuffled_within(labels, seed=1))
