"""Claims of m2ae.viz.reconstruction."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from m2ae.data.emoji import emoji
from m2ae.viz.reconstruction import draw_reconstruction_grid, reconstruction_grid


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def shown(figure: Figure, place: int) -> Tensor:
    (image,) = figure.axes[place].images
    return torch.from_numpy(np.asarray(image.get_array())).permute(2, 0, 1)


def test_images_stand_row_by_row() -> None:
    original = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    made = torch.rand(3, 3, 8, 6)
    figure = draw_reconstruction_grid({"original": original, "from text only": made}, list("abc"))
    assert len(figure.axes) == 6
    for row in range(3):
        assert torch.equal(shown(figure, 2 * row), original[row])
        assert torch.equal(shown(figure, 2 * row + 1), (made[row] * 255).round().byte())
    assert texts(figure) == ["a", "b", "c", "original", "from text only"]
    heights = [text.get_position()[1] for text in figure.texts[:3]]
    centers = [(box.y0 + box.y1) / 2 for box in (axes.get_position() for axes in figure.axes[::2])]
    assert heights == pytest.approx(centers)


def test_floats_are_clamped() -> None:
    made = torch.tensor([-1.0, 0.5, 2.0])[None, :, None, None]
    figure = draw_reconstruction_grid({"made": made.requires_grad_()}, ["a"])
    assert shown(figure, 0).flatten().tolist() == [0, 128, 255]


def test_captions_are_wrapped_cut_and_no_formulas() -> None:
    long = "costs $5, not $x_{1, " + "very " * 100
    figure = draw_reconstruction_grid({"from image and text": torch.rand(1, 3, 2, 2)}, [long])
    caption, name = texts(figure)
    lines = caption.split("\n")
    assert lines[0].startswith("costs $5, not $x_{1,")
    assert len(lines) == 6
    assert max(map(len, lines)) <= 36
    assert caption.endswith("…")
    assert name == "from image and\ntext"
    figure.draw_without_rendering()


def test_every_text_is_inside_the_figure_and_beside_the_images() -> None:
    captions = [text[0] for text in (emoji("test")[i].text for i in range(12))]
    captions[0] = "WWWWWWWWW " * 40
    columns = {
        name: torch.rand(12, 3, 2, 2)
        for name in ("original", "from image+text", "from image only", "from text only")
    }
    figure = draw_reconstruction_grid(columns, captions)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.texts]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
    for box in boxes[1:12]:
        assert box.x1 <= figure.axes[0].bbox.x0
    names = boxes[12:]
    assert all(left.x1 < right.x0 for left, right in pairwise(names))


def test_the_file_shows_the_images(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(2, 3, 4, 4)
    reconstruction_grid({"red": red}, ["a", "b"], path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    is_red = (pixels == [255, 0, 0]).all(axis=2).sum()
    assert is_red == pytest.approx(2 * 165**2, rel=0.03)  # 1.1 inches at 150 pixels each


@pytest.mark.parametrize(
    "columns, captions, message",
    [
        ({}, ["a"], "at least one column and one caption, got 0 and 1"),
        ({"made": torch.rand(0, 3, 2, 2)}, [], "got 1 and 0"),
        ({"made": torch.rand(2, 3, 2, 2)}, ["a"], r"'made' \[1, 3, H, W\].* got \[2, 3, 2, 2\]"),
        ({"made": torch.rand(1, 1, 2, 2)}, ["a"], r"got \[1, 1, 2, 2\]"),
        ({"made": torch.full((1, 3, 2, 2), torch.nan)}, ["a"], "finite 'made', got NaN"),
    ],
)
def test_wrong_arguments(columns: dict[str, Tensor], captions: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_reconstruction_grid(columns, captions)
