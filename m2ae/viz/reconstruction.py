"""Originals and what was made of them, one row for each item."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from m2ae.viz.save import save_figure

SIDE, GAP, MARGIN = 1.1, 0.08, 0.15  # inches: of an image, between images, around all
TEXT, HEADER = 2.4, 0.45  # inches: width of the captions, height of the column names
CAPTION_CHARACTERS, CAPTION_LINES = 36, 6
HEADER_CHARACTERS = 14


def reconstruction_grid(
    columns: Mapping[str, Tensor], captions: Sequence[str], path: str | Path
) -> None:
    """Write the picture of `draw_reconstruction_grid`.

    Args:
        columns: as for `draw_reconstruction_grid`.
        captions: as for `draw_reconstruction_grid`.
        path: a PNG file; its folder is made if it does not exist.

    Raises:
        ValueError: as `draw_reconstruction_grid`, or `path` does not end in ".png".
        OSError: the file cannot be written.
    """
    save_figure(draw_reconstruction_grid(columns, captions), path)


def draw_reconstruction_grid(columns: Mapping[str, Tensor], captions: Sequence[str]) -> Figure:
    """A table of images: the caption at the left of a row, the name on top of a column.

    Args:
        columns: name to images [n, 3, H, W], uint8 or floats; floats are drawn as if clamped to
            [0, 1]. H and W may differ from column to column.
        captions: n texts, wrapped; what is longer than six lines is cut.

    Returns:
        The figure, an axes for each image, row by row.

    Raises:
        ValueError: there is no column or no caption, images are not [n, 3, H, W] with an n for each
            caption, or a pixel is NaN or infinite.
    """
    n = len(captions)
    if not columns or not n:
        raise ValueError(
            "reconstruction_grid: expected at least one column and one caption, "
            f"got {len(columns)} and {n}"
        )
    pixels = {name: _pixels(name, images, n) for name, images in columns.items()}
    width = 2 * MARGIN + TEXT + len(columns) * (SIDE + GAP)
    height = 2 * MARGIN + HEADER + n * (SIDE + GAP)
    figure = Figure(figsize=(width, height))
    for row, caption in enumerate(captions):
        top = MARGIN + HEADER + row * (SIDE + GAP)  # inches from the upper edge
        figure.text(
            MARGIN / width,
            1 - (top + SIDE / 2) / height,
            "\n".join(
                textwrap.wrap(
                    caption, CAPTION_CHARACTERS, max_lines=CAPTION_LINES, placeholder=" …"
                )
            ),
            fontsize=8,
            verticalalignment="center",
            parse_math=False,
        )
        for column, images in enumerate(pixels.values()):
            left = MARGIN + TEXT + column * (SIDE + GAP)
            bottom = height - top - SIDE
            axes = figure.add_axes((left / width, bottom / height, SIDE / width, SIDE / height))
            axes.imshow(images[row].numpy(), interpolation="nearest")
            axes.set_axis_off()
    for column, name in enumerate(pixels):
        figure.text(
            (MARGIN + TEXT + column * (SIDE + GAP) + SIDE / 2) / width,
            1 - (MARGIN + HEADER - GAP) / height,
            textwrap.fill(name, HEADER_CHARACTERS),
            fontsize=9,
            fontweight="bold",
            horizontalalignment="center",
            verticalalignment="bottom",
            parse_math=False,
        )
    return figure


def _pixels(name: str, images: Tensor, n: int) -> Tensor:
    """Images as imshow takes them: uint8 [n, H, W, 3] on the CPU."""
    if images.ndim != 4 or images.shape[:2] != (n, 3) or 0 in images.shape:
        raise ValueError(
            f"reconstruction_grid: expected {name!r} [{n}, 3, H, W], one image for each caption, "
            f"got {list(images.shape)}"
        )
    if not images.isfinite().all():
        raise ValueError(f"reconstruction_grid: expected finite {name!r}, got NaN or infinity")
    images = images.detach().cpu().permute(0, 2, 3, 1)  # [n, H, W, 3]
    if images.dtype == torch.uint8:
        return images
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
