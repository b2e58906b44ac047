"""Claims of m2ae.viz.similarity."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from m2ae.viz.similarity import draw_similarity_matrix, similarity_matrix


def test_colors_are_the_similarities() -> None:
    similarities = torch.randn(5, 7, dtype=torch.float16)
    figure = draw_similarity_matrix(similarities, title="five $ by $ seven_")
    axes, bar = figure.axes
    (image,) = axes.images
    np.testing.assert_array_equal(np.asarray(image.get_array()), similarities.double().numpy())
    assert image.get_clim() == (similarities.min().item(), similarities.max().item())
    assert axes.get_title(loc="left") == "five $ by $ seven_"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("query", "key")
    assert bar.get_ylabel() == "similarity"
    figure.draw_without_rendering()  # the title is no formula


def test_labels_stand_at_their_rows_and_columns() -> None:
    figure = draw_similarity_matrix(
        torch.eye(2),
        row_labels=["cat", "a dog with a very long description of itself"],
        column_labels=["$x_1", "<b>"],
        title="",
    )
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "cat",
        "a dog with a very long…",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["$x_1", "<b>"]
    assert axes.get_yticks().tolist() == axes.get_xticks().tolist() == [0, 1]
    figure.draw_without_rendering()


@pytest.mark.parametrize("Q, K, frames", [(1, 1, 1), (3, 3, 3), (40, 40, 40), (41, 41, 0)])
def test_pairs_have_frames(Q: int, K: int, frames: int) -> None:
    axes = draw_similarity_matrix(torch.rand(Q, K), title="").axes[0]
    corners = [patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert corners == [(i - 0.5, i - 0.5) for i in range(frames)]


def test_no_pairs_in_a_matrix_that_is_not_square() -> None:
    assert not draw_similarity_matrix(torch.rand(3, 4), title="").axes[0].patches


def test_the_file_shows_a_dark_diagonal(tmp_path: Path) -> None:
    # The largest size: a cell must still be a pixel.
    path = tmp_path / "similarity.png"
    similarity_matrix(torch.eye(1500), path, title="")
    pixels = np.asarray(Image.open(path).convert("L"))
    size = min(pixels.shape)
    dark = pixels[:size, :size] < 100
    # Axes, ticks and texts are dark in few rows; the diagonal is in all rows of the matrix.
    assert dark.any(axis=1).sum() >= 1500


@pytest.mark.parametrize(
    "similarities, message",
    [
        (torch.rand(3), r"got \[3\]"),
        (torch.rand(0, 3), r"got \[0, 3\]"),
        (torch.rand(2, 1501), r"Q, K <= 1500, got \[2, 1501\]"),
        (torch.tensor([[torch.nan]]), "got NaN or infinity"),
    ],
)
def test_wrong_similarities(similarities: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_similarity_matrix(similarities, title="")


def test_wrong_labels() -> None:
    with pytest.raises(ValueError, match="expected 2 row_labels, at most 40, got 3"):
        draw_similarity_matrix(torch.eye(2), row_labels=["a"] * 3, title="")
    with pytest.raises(ValueError, match="expected 41 column_labels, at most 40, got 41"):
        draw_similarity_matrix(torch.eye(41), column_labels=["a"] * 41, title="")
