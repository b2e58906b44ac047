"""Masks: their counts, their randomness, and what they do not depend on."""

import numpy as np
import pytest
import torch

from m2ae.config import JEPAConfig
from m2ae.masking import bernoulli, draw_masks, fixed_ratio, multiblock

IDS = range(4000)


def as_rows(masks):
    """Any masks as one int tensor [B, *]."""
    tensors = [x.int() for x in vars(masks).values()]
    return torch.cat(tensors, dim=1)


def draw(kind, ids, seed=0, epoch=0, grid=(14, 14)):
    return draw_masks(JEPAConfig(masking=kind), grid, ids, seed=seed, epoch=epoch)


def test_bernoulli_masks_half_of_the_patches():
    visible = bernoulli(IDS, 196, 0.5, seed=0, epoch=0).visible
    sigma = 0.5 / visible.numel() ** 0.5
    assert abs(visible.float().mean() - 0.5) < 3 * sigma
    counts = visible.sum(dim=1).float()
    assert abs(counts.std() - 7) < 0.3  # sqrt(196 / 4): patches are independent


def test_bernoulli_takes_any_probability():
    assert not bernoulli(range(3), 196, 1.0, seed=0, epoch=0).visible.any()
    assert bernoulli(range(3), 196, 0.0, seed=0, epoch=0).visible.all()
    visible = bernoulli(IDS, 196, 0.9, seed=0, epoch=0).visible
    assert abs(visible.float().mean() - 0.1) < 3 * 0.3 / visible.numel() ** 0.5


@pytest.mark.parametrize("ratio, kept", [(0.5, 98), (0.75, 49), (0.9, 20)])
def test_fixed_ratio_keeps_an_exact_number(ratio, kept):
    masks = fixed_ratio(range(50), 196, ratio, seed=0, epoch=0)
    assert masks.keep_idx.shape == (50, kept)
    assert masks.keep_idx.dtype == masks.predict_idx.dtype == torch.int32
    everything = torch.cat([masks.keep_idx, masks.predict_idx], dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(196, dtype=torch.int32).expand(50, -1))
    for index in (masks.keep_idx, masks.predict_idx):
        assert (index.diff(dim=1) > 0).all()


@pytest.mark.parametrize("ratio, masked", [(0.01, 0), (0.99, 16)])
def test_fixed_ratio_refuses_to_leave_a_side_empty(ratio, masked):
    with pytest.raises(
        ValueError, match=f"1 to 15 of 16 patches, got {ratio}, which masks {masked}"
    ):
        fixed_ratio([0], 16, ratio, seed=0, epoch=0)


@pytest.mark.parametrize("kind", ["bernoulli", "fixed_ratio"])
def test_every_patch_is_masked_equally_often(kind):
    masks = draw(kind, IDS)
    if kind == "bernoulli":
        counts = (~masks.visible).sum(dim=0).double()
    else:
        counts = torch.bincount(masks.predict_idx.flatten(), minlength=196).double()
    # Chi-square with about 195 degrees of freedom: mean 195, standard deviation 20.
    chi_square = ((counts - 2000) ** 2 / 1000).sum()
    assert 195 - 4 * 20 < chi_square < 195 + 4 * 20


@pytest.mark.parametrize("kind", ["bernoulli", "fixed_ratio", "multiblock"])
def test_a_mask_does_not_depend_on_its_batch(kind):
    whole = as_rows(draw(kind, [5, 3, 11]))
    assert torch.equal(whole[2:], as_rows(draw(kind, [11])))
    assert torch.equal(whole[[1, 0]], as_rows(draw(kind, np.array([3, 5]))))
    torch.manual_seed(1)
    assert torch.equal(whole, as_rows(draw(kind, torch.tensor([5, 3, 11]))))
    named = as_rows(draw(kind, ["1F600", "1F603"]))
    assert torch.equal(named[1:], as_rows(draw(kind, ["1F603"])))
    assert not torch.equal(named[0], named[1])


def test_masks_are_the_same_in_every_process():
    # Values of one run, kept here: a change of the streams would change every experiment.
    assert fixed_ratio([7], 8, 0.5, seed=1, epoch=2).keep_idx.tolist() == [[0, 1, 2, 7]]
    assert fixed_ratio(["a"], 8, 0.5, seed=1, epoch=2).keep_idx.tolist() == [[2, 3, 5, 6]]


@pytest.mark.parametrize("kind", ["bernoulli", "fixed_ratio", "multiblock"])
def test_seed_epoch_and_sample_each_change_the_mask(kind):
    ids = [1] * 20  # multiblock may draw another size, so compare what is masked, by name
    base = draw(kind, ids)
    assert (as_rows(base) == as_rows(base)[0]).all()
    for other in (draw(kind, ids, seed=1), draw(kind, ids, epoch=1), draw(kind, [2] * 20)):
        a, b = as_rows(base)[0].tolist(), as_rows(other)[0].tolist()
        assert a != b
    # (seed, epoch) = (0, 1) and (1, 0) are different keys
    assert as_rows(draw(kind, ids, 0, 1))[0].tolist() != as_rows(draw(kind, ids, 1, 0))[0].tolist()


@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (4, 4), (3, 5)])
def test_multiblock_masks_blocks_and_keeps_nothing_of_them(grid):
    N = grid[0] * grid[1]
    sizes = set()
    for epoch in range(30):
        masks = multiblock(range(8), grid, seed=0, epoch=epoch)
        K, M = masks.keep_idx.shape[1], masks.predict_idx.shape[1]
        assert K + M == N
        assert M % 4 == 0
        assert max(0.2 * N, 1) >= M / 4
        assert (masks.keep_idx.diff(dim=1) > 0).all()
        for keep, predict in zip(masks.keep_idx, masks.predict_idx, strict=True):
            assert not set(keep.tolist()) & set(predict.tolist())
            for block in predict.view(4, -1):
                rows, columns = block // grid[1], block % grid[1]
                h, w = len(rows.unique()), len(columns.unique())
                assert h * w == len(block)
                assert rows.max() - rows.min() == h - 1
                assert columns.max() - columns.min() == w - 1
                sizes.add((h, w))
    assert len(sizes) > 1 or grid != (14, 14)


def test_multiblock_context_is_any_subset_of_what_is_left():
    # I-JEPA cuts contexts in raster order, which leaves the bottom rows unseen.
    masks = multiblock(IDS, (14, 14), seed=0, epoch=0)
    rows = torch.bincount(masks.keep_idx.flatten() // 14, minlength=14).double()
    assert (rows - rows.flip(0)).abs().max() / rows.mean() < 0.05


def test_multiblock_refuses_blocks_that_leave_no_context():
    with pytest.raises(ValueError, match="got 4 blocks of 1 x 1 on a grid of 2 x 2 patches"):
        multiblock([0], (2, 2), seed=0, epoch=0)


@pytest.mark.parametrize("kind", ["bernoulli", "fixed_ratio", "multiblock"])
def test_masks_move_to_a_device(kind):
    masks = draw(kind, [0])
    moved = masks.to("meta")
    assert type(moved) is type(masks)
    assert {x.device.type for x in vars(moved).values()} == {"meta"}
