"""Every query against every key, as colors."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from m2ae.viz.save import save_figure

MOST_CELLS = 1500  # of a side; beyond, a cell would be less than a pixel
MOST_LABELS = 40  # of a side; beyond, they would overlap
LABEL_CHARACTERS = 32
CELL, LEAST_SIDE, MOST_SIDE = 0.26, 3.0, 10.4  # inches
ORANGE = "#d9730d"


def similarity_matrix(
    similarities: Tensor,
    path: str | Path,
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str,
) -> None:
    """Write the picture of `draw_similarity_matrix`.

    Args:
        similarities: as for `draw_similarity_matrix`.
        path: a PNG file; its folder is made if it does not exist.
        row_labels: as for `draw_similarity_matrix`.
        column_labels: as for `draw_similarity_matrix`.
        title: as for `draw_similarity_matrix`.

    Raises:
        ValueError: as `draw_similarity_matrix`, or `path` does not end in ".png".
        OSError: the file cannot be written.
    """
    figure = draw_similarity_matrix(
        similarities, row_labels=row_labels, column_labels=column_labels, title=title
    )
    save_figure(figure, path)


def draw_similarity_matrix(
    similarities: Tensor,
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str,
) -> Figure:
    """A heat map with a color bar; the darker, the more similar.

    Let pairs meet on the diagonal. Its cells have frames if there are at most 40 of them; if there
    are more, it shows as a dark line.

    Args:
        similarities: [Q, K] finite numbers of any dtype and device, 1 <= Q, K <= 1500.
        row_labels: Q texts, at most 40; those of more than 32 characters are shortened.
        column_labels: K texts, at most 40.
        title: above the picture.

    Returns:
        The figure.

    Raises:
        ValueError: `similarities` is not as above, or labels are too many or of another number.
    """
    if similarities.ndim != 2 or not all(1 <= size <= MOST_CELLS for size in similarities.shape):
        raise ValueError(
            f"similarity_matrix: expected similarities [Q, K] with 1 <= Q, K <= {MOST_CELLS}, "
            f"got {list(similarities.shape)}"
        )
    if not similarities.isfinite().all():
        raise ValueError("similarity_matrix: expected finite similarities, got NaN or infinity")
    Q, K = similarities.shape
    width, height = (min(max(CELL * n, LEAST_SIDE), MOST_SIDE) for n in (K, Q))
    room_left, room_below = (2.4 if labels else 0.7 for labels in (row_labels, column_labels))
    figure = Figure(
        figsize=(width + room_left + 1.0, height + room_below + 0.5), layout="constrained"
    )
    axes = figure.add_subplot()
    values = similarities.detach().double().cpu().numpy()
    image = axes.imshow(values, cmap="Blues", interpolation="nearest", aspect="auto")
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    axes.set_xlabel("key", fontsize=9)
    axes.set_ylabel("query", fontsize=9)
    axes.tick_params(labelsize=8)
    if row_labels is not None:
        _check_labels("row_labels", row_labels, Q)
        axes.set_yticks(range(Q), [_short(label) for label in row_labels], parse_math=False)
    if column_labels is not None:
        _check_labels("column_labels", column_labels, K)
        texts = [_short(label) for label in column_labels]
        axes.set_xticks(range(K), texts, parse_math=False, rotation=90)
    if max(Q, K) <= MOST_LABELS and Q == K:
        for i in range(Q):
            axes.add_patch(
                Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=1.2)
            )
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=30)
    bar.set_label("similarity", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _check_labels(name: str, labels: Sequence[str], size: int) -> None:
    if len(labels) != size or size > MOST_LABELS:
        raise ValueError(
            f"similarity_matrix: expected {size} {name}, at most {MOST_LABELS}, got {len(labels)}"
        )


def _short(label: str) -> str:
    return textwrap.shorten(label, LABEL_CHARACTERS, placeholder="…")
