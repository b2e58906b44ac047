"""Claims of m2ae.evaluation.retrieval."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from m2ae.evaluation.retrieval import (
    RetrievalMetrics,
    category_only,
    confidence_interval,
    retrieval_metrics,
)


def unit_rows(rows: int, D: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn((rows, D), generator=generator), dim=1)


def brute_force(
    queries: Tensor, keys: Tensor, query_groups: list[int], key_groups: list[int]
) -> tuple[list[int], list[int]]:
    """Ranks by sorting all keys, equal scores with positives last, or first."""
    worst: list[int] = []
    best: list[int] = []
    for query, group in zip(queries, query_groups, strict=True):
        scores = [float((query.double() * key.double()).sum().float()) for key in keys]
        is_positive = [other == group for other in key_groups]
        for ranks, positives_last in ((worst, True), (best, False)):
            order = sorted(
                range(len(keys)),
                key=lambda k: (-scores[k], is_positive[k] == positives_last),
            )
            ranks.append(1 + [is_positive[k] for k in order].index(True))
    return worst, best


def recall_of(ranks: list[int], k: int) -> float:
    return 100 * sum(rank <= k for rank in ranks) / len(ranks)


def assert_equal_metrics(one: RetrievalMetrics, other: RetrievalMetrics) -> None:
    assert torch.equal(one.ranks, other.ranks)
    assert one.recall == other.recall
    assert one.optimistic_recall == other.optimistic_recall
    assert one.chance == other.chance
    assert (one.median_rank, one.mean_rank) == (other.median_rank, other.mean_rank)


def test_hand_worked_ranks() -> None:
    # Scores are the keys' columns: query 0 finds its own first, 1 second, 2 and 3 last.
    keys = torch.tensor(
        [[9.0, 5.0, 4.0, 3.0], [1.0, 4.0, 3.0, 2.0], [2.0, 1.0, 0.0, 1.0], [3.0, 2.0, 1.0, 0.0]]
    )
    metrics = retrieval_metrics(torch.eye(4), keys, ks=(1, 2, 3, 9))
    assert metrics.ranks.tolist() == [1, 2, 4, 4]
    assert metrics.ranks.dtype == torch.int64
    assert metrics.recall == {1: 25.0, 2: 50.0, 3: 50.0, 9: 100.0}
    assert metrics.optimistic_recall is None
    assert metrics.median_rank == 3.0  # between 2 and 4
    assert metrics.mean_rank == 2.75
    assert_close(metrics.chance, {1: 25.0, 2: 50.0, 3: 75.0, 9: 100.0})
    assert metrics.protocol == "1:1, 4 queries, 4 keys"


def test_any_key_of_the_group_counts_and_none_of_them_stands_in_the_way() -> None:
    # Sorted by score: keys 3 (other), 1 and 2 (own), 0 (other).
    keys = torch.tensor([[1.0], [3.0], [2.0], [4.0]])
    metrics = retrieval_metrics(
        torch.ones(2, 1),
        keys,
        query_groups=torch.tensor([7, -1]),
        key_groups=torch.tensor([-1, 7, 7, 8]),
        ks=(1, 2, 3),
    )
    assert metrics.ranks.tolist() == [2, 4]
    assert metrics.recall == {1: 0.0, 2: 50.0, 3: 50.0}
    assert metrics.protocol == "multi-positive, 2 queries, 4 keys"


# (queries, keys, values a coordinate can have): few values make many ties; one row; K < Q, K > Q.
@pytest.mark.parametrize(
    "Q, K, values", [(1, 1, 2), (40, 40, 2), (30, 50, 3), (50, 30, 3), (33, 33, 0)]
)
@pytest.mark.parametrize("grouped", [False, True])
def test_equals_sorting_all_keys(Q: int, K: int, values: int, grouped: bool) -> None:
    if values:
        generator = torch.Generator().manual_seed(Q)
        queries = torch.randint(values, (Q, 3), generator=generator).float()
        keys = torch.randint(values, (K, 3), generator=generator).float()
    else:
        queries, keys = unit_rows(Q), unit_rows(K, seed=1)
    if grouped:
        query_groups, key_groups = torch.arange(Q) % 10, torch.arange(K) % 10
    else:
        K = min(Q, K)
        queries, keys = queries[:K], keys[:K]
        query_groups = key_groups = torch.arange(K)
    worst, best = brute_force(queries, keys, query_groups.tolist(), key_groups.tolist())
    metrics = retrieval_metrics(
        queries,
        keys,
        query_groups=query_groups if grouped else None,
        key_groups=key_groups if grouped else None,
    )
    assert metrics.ranks.tolist() == worst
    assert metrics.recall == {k: recall_of(worst, k) for k in (1, 5, 10)}
    optimistic = {k: recall_of(best, k) for k in (1, 5, 10)}
    assert metrics.optimistic_recall == (optimistic if optimistic != metrics.recall else None)
    assert metrics.mean_rank == sum(worst) / len(worst)


def test_a_constant_model_is_last_and_no_query_counts_twice() -> None:
    # Counting every place of a tied score as a hit would give more hits than queries.
    metrics = retrieval_metrics(torch.ones(6, 2), torch.ones(6, 2), ks=(1, 5, 6))
    assert metrics.ranks.tolist() == [6] * 6
    assert metrics.recall == {1: 0.0, 5: 0.0, 6: 100.0}
    assert metrics.optimistic_recall == {1: 100.0, 5: 100.0, 6: 100.0}


@pytest.mark.parametrize("chunk_size", [1, 7, 256])
def test_equal_keys_tie_wherever_they_stand(chunk_size: int) -> None:
    # A product summed in float32 has other last bits for the same key at the edge of a tile.
    keys = unit_rows(1, D=301).repeat(70, 1)
    metrics = retrieval_metrics(unit_rows(70, D=301, seed=1), keys, chunk_size=chunk_size)
    assert metrics.ranks.tolist() == [70] * 70


@pytest.mark.parametrize("chunk_size", [1, 7, 100, 1000])
def test_chunks_do_not_matter(chunk_size: int) -> None:
    queries, keys = unit_rows(100, D=64), unit_rows(100, D=64, seed=1)
    keys[50:] = keys[:50]
    metrics = retrieval_metrics(queries, keys, chunk_size=chunk_size)
    assert_equal_metrics(metrics, retrieval_metrics(queries, keys))


def test_the_order_of_pairs_and_of_keys_does_not_matter() -> None:
    queries, keys = unit_rows(60), unit_rows(60, seed=1)
    expected = retrieval_metrics(queries, keys)
    order = torch.randperm(60)
    moved = retrieval_metrics(queries[order], keys[order])
    assert torch.equal(moved.ranks, expected.ranks[order])
    assert moved.recall == expected.recall
    numbers = torch.arange(60)
    shuffled = retrieval_metrics(
        queries, keys[order], query_groups=numbers, key_groups=numbers[order]
    )
    assert_equal_metrics(shuffled, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(dtype: torch.dtype) -> None:
    queries, keys = unit_rows(30).to(dtype), unit_rows(30, seed=1).to(dtype)
    expected = retrieval_metrics(queries.float(), keys.float())
    assert_equal_metrics(retrieval_metrics(queries, keys), expected)


def test_rows_are_used_as_given() -> None:
    # Key 1 is longer and so wins both, although key 0 has the better angle to query 0.
    metrics = retrieval_metrics(torch.eye(2), torch.tensor([[1.0, 0.0], [2.0, 9.0]]))
    assert metrics.ranks.tolist() == [2, 1]


def test_chance_is_the_share_of_all_orders() -> None:
    metrics = retrieval_metrics(
        torch.ones(3, 1),
        torch.ones(5, 1),
        query_groups=torch.tensor([0, 0, 1]),
        key_groups=torch.tensor([0, 1, 2, 0, 0]),
        ks=(1, 2, 3, 5, 8),
    )
    orders = list(itertools.permutations([0, 1, 2, 0, 0]))
    for k, chance in metrics.chance.items():
        hits = sum(group in order[:k] for order in orders for group in (0, 0, 1))
        assert chance == pytest.approx(100 * hits / (3 * len(orders)))


def test_random_scores_reach_chance() -> None:
    queries, keys = unit_rows(1000, D=32), unit_rows(1000, D=32, seed=1)
    groups = torch.arange(1000) // 4
    metrics = retrieval_metrics(queries, keys, query_groups=groups, key_groups=groups, ks=(50,))
    # About 18.6 %; the deviation of a share of 1000 is 1.2 %.
    assert metrics.recall[50] == pytest.approx(metrics.chance[50], abs=5)


@pytest.mark.parametrize(
    "queries, keys, error, message",
    [
        (torch.ones(0, 2), torch.ones(0, 2), ValueError, r"expected queries .* got \[0, 2\]"),
        (torch.ones(2), torch.ones(2, 2), ValueError, r"expected queries .* got \[2\]"),
        (torch.ones(2, 2), torch.ones(2, 3), ValueError, r"got \[2, 2\] and \[2, 3\]"),
        (torch.ones(2, 2), torch.ones(3, 2), ValueError, "2 queries and 3 keys; give query_groups"),
        (torch.eye(2).long(), torch.eye(2), TypeError, "queries of floats, got torch.int64"),
        (torch.eye(2), torch.eye(2).int(), TypeError, "keys of floats, got torch.int32"),
    ],
)
def test_wrong_embeddings(
    queries: Tensor, keys: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        retrieval_metrics(queries, keys)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(value: float) -> None:
    spoiled = unit_rows(5)
    spoiled[3, 2] = value
    with pytest.raises(ValueError, match="finite queries, got NaN or infinity in row 3"):
        retrieval_metrics(spoiled, unit_rows(5))
    with pytest.raises(ValueError, match="finite keys, got NaN or infinity in row 3"):
        retrieval_metrics(unit_rows(5), spoiled)


def test_wrong_groups() -> None:
    rows, groups = unit_rows(3), torch.arange(3)
    with pytest.raises(ValueError, match="expected both query_groups and key_groups or none"):
        retrieval_metrics(rows, rows, query_groups=groups)
    with pytest.raises(ValueError, match=r"expected key_groups \[3\], got \[2\]"):
        retrieval_metrics(rows, rows, query_groups=groups, key_groups=groups[:2])
    with pytest.raises(TypeError, match=r"query_groups of integers, got torch\.float32"):
        retrieval_metrics(rows, rows, query_groups=groups.float(), key_groups=groups)
    with pytest.raises(ValueError, match="got none for row 2 of queries, group 2"):
        retrieval_metrics(rows, rows, query_groups=groups, key_groups=torch.tensor([0, 1, 1]))


def test_wrong_numbers() -> None:
    rows = unit_rows(3)
    for ks in ((), (1, 0)):
        with pytest.raises(ValueError, match="expected ks of numbers >= 1"):
            retrieval_metrics(rows, rows, ks=ks)
    with pytest.raises(ValueError, match="expected chunk_size >= 1, got 0"):
        retrieval_metrics(rows, rows, chunk_size=0)


def test_category_only_by_hand() -> None:
    labels = ["a", "a", "a", "a", "b"]
    # Four queries have a fourth of a chance each at k = 1, one is sure.
    assert_close(category_only(labels, labels, (1, 2, 5)), {1: 40.0, 2: 60.0, 5: 100.0})


def test_category_only_is_what_a_category_classifier_gets() -> None:
    sizes = [size for size in (3, 5, 12) for _ in range(50)]
    labels = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    known = F.one_hot(torch.tensor([int(label) for label in labels])).float()  # [1000, 150]
    scores = known @ known.T + 0.1 * torch.rand(1000, 1000)  # own category first, else at random
    metrics = retrieval_metrics(torch.eye(1000), scores.T)
    expected = category_only(labels, labels)
    for k, recall in metrics.recall.items():
        # The deviation of a share of 1000 is at most 1.6 %.
        assert recall == pytest.approx(expected[k], abs=6.4)


def test_category_only_checks_its_labels() -> None:
    with pytest.raises(ValueError, match="at least one label, got none"):
        category_only([], [])
    with pytest.raises(ValueError, match="got 2 queries and 1 keys"):
        category_only(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="got 'b' and 'c' in row 1"):
        category_only(["a", "b"], ["a", "c"])
    with pytest.raises(ValueError, match="category_only: expected ks of numbers >= 1"):
        category_only(["a"], ["a"], ks=(0,))


def test_confidence_interval_equals_drawing_queries() -> None:
    hits = torch.arange(200) % 5 == 0  # 20 %
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(200, (20_000, 200), generator=generator)
    shares = 100 * hits[rows].double().mean(dim=1)
    low, high = confidence_interval(hits, seed=0, samples=20_000)
    # Shares are multiples of 0.5 %; the limits of two samplings may be one apart.
    assert low == pytest.approx(float(shares.quantile(0.025)), abs=0.5)
    assert high == pytest.approx(float(shares.quantile(0.975)), abs=0.5)


def test_confidence_interval_depends_on_its_seed_only() -> None:
    hits = torch.arange(1000) % 3 == 0
    first = confidence_interval(hits, seed=1)
    torch.rand(5)  # the global generator has no part in it
    assert confidence_interval(hits, seed=1) == first
    assert len({confidence_interval(hits, seed=seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("value", [False, True])
def test_confidence_interval_of_one_outcome(value: bool) -> None:
    share = 100.0 * value
    assert confidence_interval(torch.full((9,), value), seed=0) == (share, share)


def test_confidence_interval_checks_its_arguments() -> None:
    with pytest.raises(TypeError, match=r"expected hits of bool, got torch\.int64"):
        confidence_interval(torch.ones(3, dtype=torch.int64), seed=0)
    for shape in ((0,), (2, 2)):
        with pytest.raises(ValueError, match=r"expected hits \[Q\] with Q >= 1"):
            confidence_interval(torch.ones(shape, dtype=torch.bool), seed=0)
    with pytest.raises(ValueError, match="expected samples >= 1, got 0"):
        confidence_interval(torch.ones(3, dtype=torch.bool), seed=0, samples=0)
