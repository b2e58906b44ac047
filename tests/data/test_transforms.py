"""Claims of m2ae.data.transforms."""

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from m2ae.data.transforms import (
    center_square,
    color_jitter,
    crop_and_jitter,
    generator_for,
    random_horizontal_flip,
    random_resized_crop,
    resize,
)

RANDOM: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "crop": lambda image, generator: random_resized_crop(image, 16, generator),
    "flip": random_horizontal_flip,
    "jitter": color_jitter,
    "both": lambda image, generator: crop_and_jitter(image, 16, generator),
}


def picture(H: int = 24, W: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, H, W), dtype=torch.uint8, generator=generator)


def draw(seed: int, epoch: int, sample_id: str) -> int:
    return int(torch.randint(2**60, (), generator=generator_for(seed, epoch, sample_id)))


def test_generators_differ_by_seed_epoch_and_id() -> None:
    draws = {
        draw(seed, epoch, name) for seed in (0, 1) for epoch in (0, 1, 11) for name in ("1/a", "a")
    }
    assert len(draws) == 12


def test_generators_are_the_same_everywhere() -> None:
    # Pinned: a different hash would change every training run.
    assert draw(3, 2, "1F431") == 471994110439410367
    torch.manual_seed(5)
    assert draw(3, 2, "1F431") == 471994110439410367


@pytest.mark.parametrize("name", RANDOM)
def test_random_operations_depend_on_their_generator_only(name: str) -> None:
    image = picture()
    before = torch.get_rng_state()
    results = [RANDOM[name](image, generator_for(0, epoch, "x")) for epoch in (*range(8), 0)]
    assert_close(results[0], results[-1])
    assert any(not torch.equal(results[0], result) for result in results)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(image, picture())  # the input is left alone


def test_resize_averages_when_it_shrinks() -> None:
    # Antialiased, a checkerboard of single pixels is gray; sampled, it is black or white.
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    small = resize(board.to(torch.uint8).expand(3, 64, 64), 8)
    assert small.shape == (3, 8, 8)
    assert small.dtype == torch.uint8
    inner = small[:, 1:-1, 1:-1].float()
    assert_close(inner, torch.full_like(inner, 127.5), rtol=0, atol=1)  # rounding to uint8


def test_resize_clamps_where_bicubic_overshoots() -> None:
    step = torch.zeros(3, 8, 8, dtype=torch.uint8)
    step[:, :, 4:] = 255
    large = resize(step, 32)
    # Unclamped, the values left of the edge would be below 0, and wrap around to 250 and more.
    assert large[:, :, :13].max() == 0
    assert large[:, :, -13:].min() == 255


def test_resize_keeps_one_color_and_the_right_size() -> None:
    flat = torch.full((3, 7, 5), 200, dtype=torch.uint8)
    assert torch.equal(resize(flat, 9), torch.full((3, 9, 9), 200, dtype=torch.uint8))
    image = picture(16, 16)
    assert torch.equal(resize(image, 16), image)


@pytest.mark.parametrize("H, W", [(4, 9), (9, 4), (5, 5), (1, 3)])
def test_center_square_cuts_equal_parts_off(H: int, W: int) -> None:
    image = picture(H, W)
    S = min(H, W)
    top, left = (H - S) // 2, (W - S) // 2
    assert torch.equal(center_square(image), image[:, top : top + S, left : left + S])


def test_a_crop_covers_the_asked_share_of_the_area() -> None:
    # The first channel tells the row and the second the column that a pixel comes from.
    rows, columns = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    for seed in range(50):
        crop = random_resized_crop(image, 200, generator_for(seed, 0, ""), (0.2, 0.5), (0.5, 2.0))
        height, width = (int(axis.max()) - int(axis.min()) + 1 for axis in crop[:2])
        # Bicubic extremes and rounding move each side by at most 2 pixels of 60 or more.
        assert 0.2 * 0.93 <= height * width / 200**2 <= 0.5 * 1.07
        assert 0.5 * 0.93 <= width / height <= 2.0 * 1.07


def test_a_crop_of_everything_is_a_resize() -> None:
    image = picture(20, 20)
    crop = random_resized_crop(image, 12, generator_for(0, 0, ""), (1.0, 1.0), (1.0, 1.0))
    assert torch.equal(crop, resize(image, 12))


@pytest.mark.parametrize("H, W", [(1, 1), (1, 40), (40, 1)])
def test_a_crop_of_a_thin_image_is_cut_at_its_border(H: int, W: int) -> None:
    assert random_resized_crop(picture(H, W), 8, generator_for(0, 0, "")).shape == (3, 8, 8)


@pytest.mark.parametrize("probability, mirrored", [(0.0, 0), (1.0, 200), (0.25, 50)])
def test_flips_happen_as_often_as_asked(probability: float, mirrored: int) -> None:
    image = picture()
    count = 0
    for seed in range(200):
        result = random_horizontal_flip(image, generator_for(seed, 0, ""), probability)
        is_mirrored = torch.equal(result, image.flip(2))
        assert is_mirrored or torch.equal(result, image)
        count += is_mirrored
    # 4 standard deviations of a binomial count: 24 of 200 at 0.25, none at 0 and 1.
    assert abs(count - mirrored) <= 4 * (200 * probability * (1 - probability)) ** 0.5


def test_jitter_is_bounded_and_off_at_zero() -> None:
    image = picture()
    assert torch.equal(color_jitter(image, generator_for(0, 0, ""), 0.0), image)
    gray = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    for seed in range(50):
        result = color_jitter(gray, generator_for(seed, 0, ""), 0.2)
        # Contrast and saturation leave even gray alone; brightness moves it by 20 % at most.
        assert 80 <= int(result.min()) == int(result.max()) <= 120


@pytest.mark.parametrize("operation", [center_square, *(RANDOM.values())])
def test_a_wrong_image_is_refused(operation: Callable[..., Tensor]) -> None:
    rest = [] if operation is center_square else [generator_for(0, 0, "")]
    with pytest.raises(TypeError, match=r"expected an image of dtype torch.uint8, got torch.float"):
        operation(picture().float(), *rest)
    with pytest.raises(ValueError, match=r"expected an image \[3, H, W\], got \[4, 4\]"):
        operation(torch.zeros(4, 4, dtype=torch.uint8), *rest)
    with pytest.raises(ValueError, match=r"expected an image \[3, H, W\], got \[3, 0, 4\]"):
        operation(torch.zeros(3, 0, 4, dtype=torch.uint8), *rest)


def test_wrong_ranges_are_refused() -> None:
    image, generator = picture(), generator_for(0, 0, "")
    with pytest.raises(ValueError, match="resize: expected size >= 1, got 0"):
        resize(image, 0)
    with pytest.raises(ValueError, match=r"expected 0 < scale\[0\] <= scale\[1\] <= 1, got"):
        random_resized_crop(image, 8, generator, scale=(0.5, 1.5))
    with pytest.raises(ValueError, match=r"expected 0 < ratio\[0\] <= ratio\[1\], got"):
        random_resized_crop(image, 8, generator, ratio=(2.0, 1.0))
    with pytest.raises(ValueError, match="expected 0 <= probability <= 1, got 2"):
        random_horizontal_flip(image, generator, 2)
    with pytest.raises(ValueError, match="expected 0 <= strength <= 1, got -1"):
        color_jitter(image, generator, -1)
