"""The statistics of a matrix from those of its parts, without processes."""

import pytest
import torch
from torch.testing import assert_close

from m2ae_kernels.distributed._statistics import Statistics, merged, merged_pair, statistics
from m2ae_kernels.ops import _info_nce_loss_reference

N, M, D = 12, 9, 5
PARTS = (slice(0, 4), slice(4, 5), slice(5, 5), slice(5, 12))  # of the queries; one is empty


def columns(query, key, scale, target, ids):
    """What the reference says of the columns."""
    query_ids, key_ids = ids if ids is not None else (None, None)
    given = (query, key, torch.tensor(scale), target, None, None, query_ids, key_ids)
    same_id = 0 if ids is None else 2
    options = (0, -100, same_id, False, True, 1e-12, True, False, False, False, 0)
    outputs = _info_nce_loss_reference.forward(*given, *options)
    return statistics(outputs[1], outputs[3], outputs[5], outputs[7])


def inputs(spread, ids):
    key = torch.randn(M, D)
    order = torch.randperm(M)  # each key is the positive of one query, and three queries have none
    target = torch.cat([order, torch.full((N - M,), -100)])
    query = torch.cat([key[order], torch.randn(N - M, D)])
    query = query + spread * torch.randn(N, D)
    return query, key, target, (torch.arange(N) % 5, torch.arange(M) % 4) if ids else None


def parts_of(query, key, scale, target, ids):
    split = (
        (query[rows], target[rows], None if ids is None else (ids[0][rows], ids[1]))
        for rows in PARTS
    )
    return [columns(x, key, scale, of, group) for x, of, group in split]


@pytest.mark.parametrize("ids", [False, True], ids=["one positive", "several"])
@pytest.mark.parametrize("scale", [0.0, 5.0, -5.0, 300.0])
def test_parts_make_the_whole(scale, ids):
    query, key, target, groups = inputs(0.5, ids)
    whole = columns(query.double(), key.double(), scale, target, groups)
    assert (whole.num.max() > 1) or not ids
    parts = parts_of(query, key, scale, target, groups)
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = merged_pair(one_by_one, part)
    stacked = Statistics(*(torch.stack(of) for of in zip(*parts, strict=True)))
    at_once = merged(stacked, lambda of: of.amax(1), lambda of: of.sum(1))
    expected = Statistics(*(of.float() for of in whole))
    # A logit of `scale` is off by about scale * 2**-23, whatever its statistic is.
    atol = 1e-5 + abs(scale) * 2**-22
    for got in (one_by_one, at_once):
        assert_close(got, expected, rtol=1.3e-6, atol=atol)
        assert_close(got.loss(), whole.loss().float(), rtol=1.3e-6, atol=atol)


def test_what_a_converged_pair_has_left_to_lose_keeps_its_digits():
    x = torch.linalg.qr(torch.randn(8, 8)).Q  # cosines of 0, and of 1 with their keys
    target = torch.arange(8)
    whole = columns(x.double(), x.double(), 60.0, target, None)
    parts = [columns(x[rows], x, 60.0, target[rows], None) for rows in (slice(5), slice(5, 8))]
    loss = merged_pair(*parts).loss()
    assert (whole.loss() < 1e-24).all()
    # exp of a logit of 60, which is off by 60 * 2**-23 and by as much again for its rounding.
    assert_close(loss, whole.loss().float(), rtol=4 * 60 * 2**-23, atol=0)


def test_one_positive_has_no_excess():
    query, key, target, _ = inputs(0.5, False)
    parts = parts_of(query, key, 300.0, target, None)
    for part in parts[1:]:
        parts[0] = merged_pair(parts[0], part)
    assert (parts[0].num == 1).any()
    assert (parts[0].excess == 0).all()


def test_nan_spreads():
    query, key, target, _ = inputs(0.5, False)
    query[6] = torch.nan
    first, second = parts_of(query, key, 5.0, target, None)[::3]
    assert merged_pair(first, second).neg.isnan().any()


def test_no_part_has_anything():
    nothing = Statistics(*(torch.tensor([of]) for of in (-torch.inf, 0.0, 0.0, 0.0)))
    got = merged_pair(nothing, nothing)
    assert got.neg == -torch.inf
    assert [got.pos, got.num, got.excess, got.loss()] == [0, 0, 0, 0]
