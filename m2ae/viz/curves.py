"""How the terms of the objective go down over the steps of a run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from m2ae.viz.save import save_figure

# Of the names in a log: what a panel is called and what its values are.
PANELS = {
    "loss": ("objective", "weighted sum of terms"),
    "recon_image": ("image reconstruction", "MSE, pixels in [0, 1]"),
    "recon_text": ("text reconstruction", "MSE, word embeddings"),
    "cross_image": ("image from text", "MSE, pixels in [0, 1]"),
    "cross_text": ("text from image", "MSE, word embeddings"),
    "jepa": ("masked patches", "error of features"),
    "align": ("image-text alignment", "InfoNCE, nats"),
    "lr": ("learning rate", "step size"),
    "grad_norm": ("gradient norm", "before clipping"),
    "ema_decay": ("target encoder's decay", "share kept per step"),
}
SCHEDULES = ("lr", "ema_decay")  # exact: a mean would round off their corners
NOT_DRAWN = ("step", "epoch", "shortened")
VALIDATION = "val_"  # prefix of a term's name
BLUE, ORANGE = "#1f5fa8", "#d9730d"
COLUMNS, WIDTH, HEIGHT = 3, 3.5, 2.3  # panels beside each other; inches of one panel

Series = tuple[NDArray[np.float64], NDArray[np.float64]]  # steps [n] and values [n]


def loss_curves(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write the picture of `draw_loss_curves`.

    Args:
        rows: as for `draw_loss_curves`.
        path: a PNG file; its folder is made if it does not exist.

    Raises:
        ValueError: as `draw_loss_curves`, or `path` does not end in ".png".
        OSError: the file cannot be written.
    """
    save_figure(draw_loss_curves(rows), path)


def draw_loss_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """One small panel for each term: faint points as logged, their running mean, validation.

    "lr" and "ema_decay" are drawn as they are.

    Args:
        rows: of a log: "step" and any numbers, not the same in every row. A term's values on
            validation data have its name behind "val_" and come into its panel. "epoch" and what is
            not a number are left out; NaN and infinities are gaps.

    Returns:
        The figure: "loss" first, other terms in the order in which the log names them.

    Raises:
        ValueError: a row has no "step", or there is no number to draw.
    """
    series = _series(rows)
    terms = list(dict.fromkeys(name.removeprefix(VALIDATION) for name in series))
    terms.sort(key=lambda name: name != "loss")  # stable
    if not terms:
        raise ValueError(f"loss_curves: expected rows with numbers, got none in {len(rows)} rows")
    columns = min(COLUMNS, len(terms))
    lines = math.ceil(len(terms) / columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * lines + 0.3), layout="constrained")
    handles: dict[str, Artist] = {}
    for i, term in enumerate(terms):
        axes = figure.add_subplot(lines, columns, i + 1)
        _draw_panel(axes, term, series.get(term), series.get(VALIDATION + term))
        axes_handles, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, axes_handles, strict=True))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper left",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    return figure


def _draw_panel(axes: Axes, term: str, train: Series | None, validation: Series | None) -> None:
    title, unit = PANELS.get(term, (term, "value"))
    named = title if title == term else f"{title} ({term})"
    axes.set_title(named, fontsize=9, loc="left", parse_math=False)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:g}")
    if train is not None and term in SCHEDULES:
        axes.plot(*train, color=BLUE, linewidth=1.5)
    elif train is not None:
        steps, values = train
        axes.plot(steps, values, ".", color=BLUE, alpha=0.25, markersize=3, label="as logged")
        axes.plot(steps, _running_mean(values), color=BLUE, linewidth=1.5, label="running mean")
    if validation is not None:
        axes.plot(
            *validation, "o-", color=ORANGE, linewidth=1.2, markersize=3.5, label="validation"
        )


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """For each name in the log, its steps and values in the order of the rows."""
    points: dict[str, list[tuple[float, float]]] = {}
    for i, row in enumerate(rows):
        if "step" not in row:
            raise ValueError(f"loss_curves: expected a step in every row, got none in row {i}")
        for name, value in row.items():
            if name not in NOT_DRAWN and isinstance(value, int | float):
                points.setdefault(name, []).append((row["step"], value))
    series = {}
    for name, pairs in points.items():
        steps, values = np.array(pairs, dtype=np.float64).T  # [n], [n]
        series[name] = steps, np.where(np.isfinite(values), values, np.nan)
    return series


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each value's neighbors, about a twentieth of all; fewer at both ends.

    Args:
        values: [n], NaN where there is no value.

    Returns:
        [n], NaN where there is no neighbor.
    """
    n = len(values)
    half = max(1, n // 40)
    is_value = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(is_value, values, 0.0))))  # [n + 1]
    counts = np.concatenate(([0], np.cumsum(is_value)))  # [n + 1]
    first = np.maximum(np.arange(n) - half, 0)
    last = np.minimum(np.arange(n) + half + 1, n)
    number = counts[last] - counts[first]
    means: NDArray[np.float64] = (sums[last] - sums[first]) / np.where(number == 0, np.nan, number)
    return means
