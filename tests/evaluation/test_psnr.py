"""Claims of m2ae.evaluation.reconstruction."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from m2ae.evaluation.reconstruction import mean_image_psnr, psnr


def images(B: int, H: int = 4, W: int = 6) -> Tensor:
    return torch.rand((B, 3, H, W), generator=torch.Generator().manual_seed(B))


def test_known_errors() -> None:
    targets = images(3)
    offsets = torch.tensor([0.1, 1.0, 0.0])[:, None, None, None]
    result = psnr(targets + offsets, targets)
    # Mean squared errors 0.01, 1 and 0. The sum rounds in float32: 1e-7 / 0.1, 1e-5 dB.
    assert_close(result, torch.tensor([20.0, 0.0, math.inf]), atol=1e-4, rtol=0)
    assert result.dtype == torch.float32


def test_an_image_counts_by_itself() -> None:
    made, targets = images(4), images(5)[:4]
    alone = torch.cat([psnr(made[i : i + 1], targets[i : i + 1]) for i in range(4)])
    assert_close(psnr(made, targets), alone)
    expected = [-10 * math.log10(float((made[i] - targets[i]).square().mean())) for i in range(4)]
    assert_close(alone, torch.tensor(expected))


def test_range_of_the_data() -> None:
    made, targets = images(4), images(5)[:4]
    assert_close(psnr(255 * made, 255 * targets, data_range=255.0), psnr(made, targets))


def test_half_precision_errors_do_not_vanish() -> None:
    # In float16 the square of 1e-4 is 0.
    made = torch.full((1, 3, 2, 2), 1e-4, dtype=torch.float16)
    assert_close(psnr(made, torch.zeros_like(made)), torch.tensor([80.0]), atol=0.01, rtol=0)


def test_nan_stays_in_its_image() -> None:
    made = images(2)
    made[1, 0, 0, 0] = math.nan
    result = psnr(made, images(2))
    assert result[0] == math.inf
    assert result[1].isnan()


def test_no_images() -> None:
    assert psnr(images(0), images(0)).shape == (0,)


def test_the_mean_image_is_the_best_constant_for_its_own_images() -> None:
    train = images(20)
    error = -mean_image_psnr(train, train) / 10
    assert_close((10**error).mean(), train.var(dim=0, correction=0).mean())
    assert mean_image_psnr(train[:1], train[:1]).tolist() == [math.inf]


@pytest.mark.parametrize(
    "made, targets, error, message",
    [
        (images(2), images(3), ValueError, r"of one shape, got \[2, 3, 4, 6\] and \[3, 3, 4, 6\]"),
        (images(2)[0], images(2)[0], ValueError, r"images \[B, 3, H, W\], got \[3, 4, 6\]"),
        (images(2)[:, :1], images(2)[:, :1], ValueError, r"got \[2, 1, 4, 6\]"),
        (images(2, H=0), images(2, H=0), ValueError, r"got \[2, 3, 0, 6\]"),
        (images(2), images(2).byte(), TypeError, "targets of floats, got torch.uint8"),
    ],
)
def test_wrong_images(made: Tensor, targets: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        psnr(made, targets)


def test_wrong_range() -> None:
    with pytest.raises(ValueError, match=r"expected data_range > 0, got 0\.0"):
        psnr(images(1), images(1), data_range=0.0)


@pytest.mark.parametrize("train", [images(0), images(2, H=5)])
def test_wrong_training_images(train: Tensor) -> None:
    with pytest.raises(ValueError, match=r"mean_image_psnr: expected train_images \[n, 3, H, W\]"):
        mean_image_psnr(train, images(2))
