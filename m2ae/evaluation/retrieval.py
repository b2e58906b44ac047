r"""Retrieval: where a query's own key stands among all keys, sorted by score.

    score[q, k] = <query q, key k>
    best[q]     = max over positives k of q   score[q, k]
    rank[q]     = 1 + #{k not a positive of q: score[q, k] >= best[q]}     (> if optimistic)
    recall@k    = 100 * mean over q           (rank[q] <= k)

Without groups, key i is the only positive of query i; with groups, all keys of its group are. A
model that gives everything one score has the worst rank everywhere, not the best.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

DEFAULT_KS = (1, 5, 10)


@dataclass(frozen=True, eq=False)
class RetrievalMetrics:
    """What Q queries found among K keys.

    Attributes:
        recall: k to the percentage of queries with a positive among the first k keys; ties count
            against the query.
        optimistic_recall: the same with ties counted for the query; None where nothing differs.
        median_rank: of `ranks`; the mean of the two in the middle if Q is even.
        mean_rank: of `ranks`.
        chance: k to the percentage that a random order of the same keys is expected to reach.
        protocol: "1:1, 449 queries, 449 keys", or "multi-positive, ..." where groups were given.
        ranks: int64 [Q] on the CPU, from 1; ties count against the query.
    """

    recall: dict[int, float]
    optimistic_recall: dict[int, float] | None
    median_rank: float
    mean_rank: float
    chance: dict[int, float]
    protocol: str
    ranks: Tensor


def retrieval_metrics(
    queries: Tensor,
    keys: Tensor,
    *,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    ks: Sequence[int] = DEFAULT_KS,
    chunk_size: int = 256,
) -> RetrievalMetrics:
    """Sort the keys for every query and see where its own are.

    Scores are float32, rounded from sums in float64: equal keys tie exactly, whatever the order of
    the keys and the size of a chunk.

    Args:
        queries: [Q, D] floats, used as they are: normalize them for cosine similarity.
        keys: [K, D] floats. Without groups K = Q and key i belongs to query i.
        query_groups: [Q] integers. A query's positives are the keys of its group.
        key_groups: [K] integers; given if and only if `query_groups` is.
        ks: for which k to compute the recall; at least 1 each.
        chunk_size: queries at a time, at least 1; memory is about 16 * chunk_size * K bytes.

    Returns:
        Recall, ranks, and the chance level of this very task.

    Raises:
        ValueError: shapes do not fit; there is no query; an embedding has NaN or infinities (the
            row is named); a query has no positive; one kind of groups is missing; a k or
            `chunk_size` is below 1.
        TypeError: embeddings are not floats or groups are not integers.
    """
    _check_ks("retrieval_metrics", ks)
    if chunk_size < 1:
        raise ValueError(f"retrieval_metrics: expected chunk_size >= 1, got {chunk_size}")
    _check_embeddings("queries", queries)
    _check_embeddings("keys", keys)
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(
            "retrieval_metrics: expected queries [Q, D] and keys [K, D], "
            f"got {list(queries.shape)} and {list(keys.shape)}"
        )
    Q, K = len(queries), len(keys)
    kind = "1:1" if query_groups is None else "multi-positive"
    query_groups, key_groups = _groups(query_groups, key_groups, queries, keys)

    keys = keys.double()
    worst, best, positives = [], [], []
    for rows, groups in zip(queries.split(chunk_size), query_groups.split(chunk_size), strict=True):
        scores = (rows.double() @ keys.T).float()  # [C, K]
        is_positive = groups[:, None] == key_groups  # [C, K]
        own = scores.masked_fill(~is_positive, -math.inf).amax(dim=1, keepdim=True)  # [C, 1]
        worst.append((~is_positive & (scores >= own)).sum(dim=1))
        best.append((~is_positive & (scores > own)).sum(dim=1))
        positives.append(is_positive.sum(dim=1))
    ranks = 1 + torch.cat(worst).cpu()  # [Q]
    optimistic_ranks = 1 + torch.cat(best).cpu()  # [Q]
    counts = torch.cat(positives).tolist()
    if 0 in counts:
        row = counts.index(0)
        raise ValueError(
            "retrieval_metrics: expected a key in the group of every query, "
            f"got none for row {row} of queries, group {int(query_groups[row])}"
        )

    recall = _recall(ranks, ks)
    optimistic_recall = _recall(optimistic_ranks, ks)
    return RetrievalMetrics(
        recall=recall,
        optimistic_recall=optimistic_recall if optimistic_recall != recall else None,
        median_rank=float(ranks.double().quantile(0.5)),
        mean_rank=float(ranks.double().mean()),
        chance=_expected_recall(Counter((count, K) for count in counts), ks),
        protocol=f"{kind}, {Q} queries, {K} keys",
        ranks=ranks,
    )


def category_only(
    labels_of_queries: Sequence[str], labels_of_keys: Sequence[str], ks: Sequence[int] = DEFAULT_KS
) -> dict[int, float]:
    """The recall of somebody who knows every category perfectly and nothing else.

    All keys of the query's category come first, in random order. Print it beside every result: only
    what is above it is knowledge about single items.

    Args:
        labels_of_queries: the category of each of Q queries.
        labels_of_keys: of their keys: 1:1, key i belongs to query i.
        ks: for which k; at least 1 each.

    Returns:
        k to the expected recall in percent, the mean over queries of min(k, n) / n for a category
        of n keys.

    Raises:
        ValueError: the labels are not the same row by row; there are none; a k is below 1.
    """
    _check_ks("category_only", ks)
    if not labels_of_queries:
        raise ValueError("category_only: expected at least one label, got none")
    if len(labels_of_queries) != len(labels_of_keys):
        raise ValueError(
            "category_only: expected one key for every query, "
            f"got {len(labels_of_queries)} queries and {len(labels_of_keys)} keys"
        )
    for row, (label, other) in enumerate(zip(labels_of_queries, labels_of_keys, strict=True)):
        if label != other:
            raise ValueError(
                "category_only: expected query and key of a row in one category, "
                f"got {label!r} and {other!r} in row {row}"
            )
    sizes = Counter(labels_of_keys)
    return _expected_recall(Counter((1, sizes[label]) for label in labels_of_queries), ks)


def confidence_interval(hits: Tensor, seed: int, samples: int = 1000) -> tuple[float, float]:
    """Between which limits a recall would lie for other queries of the same kind.

    A percentile bootstrap over queries. The hits of Q queries drawn with replacement are a binomial
    number, so that is what is drawn. If all queries hit, or none, both limits are that value.

    Args:
        hits: bool [Q], such as `metrics.ranks <= 10`; at least one.
        seed: of the resampling.
        samples: how many times the queries are drawn anew, at least 1.

    Returns:
        The 2.5th and the 97.5th percentile of the recall, in percent.

    Raises:
        ValueError: `hits` is not [Q] with Q >= 1, or `samples` is below 1.
        TypeError: `hits` is not bool.
    """
    if hits.dtype != torch.bool:
        raise TypeError(f"confidence_interval: expected hits of bool, got {hits.dtype}")
    if hits.ndim != 1 or not len(hits):
        raise ValueError(
            f"confidence_interval: expected hits [Q] with Q >= 1, got {list(hits.shape)}"
        )
    if samples < 1:
        raise ValueError(f"confidence_interval: expected samples >= 1, got {samples}")
    Q = len(hits)
    share = hits.double().mean().cpu().expand(samples)
    number = torch.full((samples,), Q, dtype=torch.float64)
    drawn = torch.binomial(number, share, generator=Generator().manual_seed(seed))
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return 100 * float(low) / Q, 100 * float(high) / Q


def _groups(
    query_groups: Tensor | None, key_groups: Tensor | None, queries: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Group numbers [Q] and [K] on the device of the keys; row numbers if none are given."""
    Q, K = len(queries), len(keys)
    if query_groups is None and key_groups is None:
        if Q != K:
            raise ValueError(
                "retrieval_metrics: expected one key for every query, "
                f"got {Q} queries and {K} keys; give query_groups and key_groups"
            )
        rows = torch.arange(Q, device=keys.device)
        return rows, rows
    if query_groups is None or key_groups is None:
        raise ValueError(
            "retrieval_metrics: expected both query_groups and key_groups or none, got one"
        )
    for name, groups, size in (("query_groups", query_groups, Q), ("key_groups", key_groups, K)):
        if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
            raise TypeError(f"retrieval_metrics: expected {name} of integers, got {groups.dtype}")
        if groups.shape != (size,):
            raise ValueError(
                f"retrieval_metrics: expected {name} [{size}], got {list(groups.shape)}"
            )
    return query_groups.to(keys.device), key_groups.to(keys.device)


def _recall(ranks: Tensor, ks: Sequence[int]) -> dict[int, float]:
    return {k: 100 * int((ranks <= k).sum()) / len(ranks) for k in ks}


def _expected_recall(queries: Counter[tuple[int, int]], ks: Sequence[int]) -> dict[int, float]:
    """Recall in percent of random orders.

    Args:
        queries: how many queries have (p positives, n keys that come in random order), 1 <= p <= n.
        ks: for which k.
    """

    def miss(p: int, n: int, k: int) -> float:
        k = min(k, n)
        return math.comb(n - p, k) / math.comb(n, k)

    total = queries.total()
    return {
        k: 100 * (1 - sum(count * miss(p, n, k) for (p, n), count in queries.items()) / total)
        for k in ks
    }


def _check_ks(name: str, ks: Sequence[int]) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"{name}: expected ks of numbers >= 1, got {tuple(ks)}")


def _check_embeddings(name: str, rows: Tensor) -> None:
    if not rows.is_floating_point():
        raise TypeError(f"retrieval_metrics: expected {name} of floats, got {rows.dtype}")
    if rows.ndim != 2 or not len(rows):
        raise ValueError(
            f"retrieval_metrics: expected {name} [rows, D] with a row at least, "
            f"got {list(rows.shape)}"
        )
    is_finite = rows.isfinite().all(dim=1)  # [rows]
    if not is_finite.all():
        row = int((~is_finite).nonzero()[0])
        raise ValueError(
            f"retrieval_metrics: expected finite {name}, got NaN or infinity in row {row}"
        )
