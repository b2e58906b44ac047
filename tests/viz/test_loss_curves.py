"""Claims of m2ae.viz.curves and m2ae.viz.save."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from m2ae.viz.curves import draw_loss_curves, loss_curves
from m2ae.viz.save import DPI, save_figure


def rows(n: int = 100) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    for step in range(0, 10 * n, 10):
        log.append({"step": step, "epoch": 0, "align": 3.0 - step / 1000, "loss": 5.0, "lr": 1e-3})
        if step % 100 == 90:
            log.append({"step": step, "val_loss": 6.0, "val_align": 4.0})
    return log


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (
            np.asarray(line.get_xdata()).tolist(),
            np.asarray(line.get_ydata()).tolist(),
        )
        for line in axes.lines
    }


def test_a_panel_for_every_term_the_objective_first() -> None:
    figure = draw_loss_curves(rows())
    titles = ["objective (loss)", "image-text alignment (align)", "learning rate (lr)"]
    assert list(panels(figure)) == titles
    for axes in figure.axes:
        assert axes.get_xlabel() == "step"
    units = [axes.get_ylabel() for axes in figure.axes]
    assert units == ["weighted sum of terms", "InfoNCE, nats", "step size"]


def test_points_mean_and_validation_are_those_of_the_log() -> None:
    drawn = lines(panels(draw_loss_curves(rows()))["image-text alignment (align)"])
    steps = [10.0 * i for i in range(100)]
    assert drawn["as logged"] == (steps, [3.0 - step / 1000 for step in steps])
    assert drawn["validation"] == (steps[9::10], [4.0] * 10)
    means = drawn["running mean"][1]
    values = drawn["as logged"][1]
    # 100 points: two neighbors on each side, as far as there are any
    assert means[0] == pytest.approx(sum(values[:3]) / 3)
    assert means[50] == pytest.approx(sum(values[48:53]) / 5)
    assert means[99] == pytest.approx(sum(values[97:]) / 3)


def test_schedules_are_not_smoothed() -> None:
    log = [{"step": step, "lr": 1.0 * (step == 5)} for step in range(9)]
    (axes,) = draw_loss_curves(log).axes
    (line,) = axes.lines
    assert np.asarray(line.get_ydata()).tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0]


def test_what_is_not_finite_is_a_gap() -> None:
    values = [1.0, math.nan, 3.0, math.inf, math.nan, -math.inf, 7.0]
    log = [{"step": step, "loss": value} for step, value in enumerate(values)]
    (axes,) = draw_loss_curves(log).axes
    drawn = lines(axes)
    np.testing.assert_array_equal(drawn["as logged"][1], [1, np.nan, 3, np.nan, np.nan, np.nan, 7])
    np.testing.assert_array_equal(drawn["running mean"][1], [1, 2, 3, 3, np.nan, 7, 7])


def test_unknown_terms_are_drawn_and_texts_are_not() -> None:
    figure = draw_loss_curves([{"step": 0, "speed_$": 2, "note": "warm", "val_rank": 3.0}])
    assert list(panels(figure)) == ["speed_$", "rank"]
    assert list(lines(figure.axes[1])) == ["validation"]


def test_the_legend_names_each_kind_once() -> None:
    (legend,) = draw_loss_curves(rows()).legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["as logged", "running mean", "validation"]


def test_wrong_rows() -> None:
    with pytest.raises(ValueError, match="expected a step in every row, got none in row 1"):
        draw_loss_curves([{"step": 0, "loss": 1.0}, {"loss": 1.0}])
    with pytest.raises(ValueError, match="expected rows with numbers, got none in 1 rows"):
        draw_loss_curves([{"step": 0, "epoch": 1, "note": "warm"}])


def test_the_file_is_a_picture_of_the_size_of_the_figure(tmp_path: Path) -> None:
    path = tmp_path / "new" / "curves.png"
    loss_curves(rows(), path)
    width, height = draw_loss_curves(rows()).get_size_inches()
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (round(width * DPI), round(height * DPI))
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]


def test_the_same_figure_gives_the_same_file(tmp_path: Path) -> None:
    loss_curves(rows(), tmp_path / "a.png")
    loss_curves(rows(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")

    class Broken(Figure):
        def savefig(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_figure(Broken(), path)
    assert path.read_text() == "old"


def test_only_png(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.png, got 'a\.jpg'"):
        loss_curves(rows(), tmp_path / "a.jpg")


def test_nothing_goes_through_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from m2ae.viz.curves import loss_curves\n"
        "loss_curves([{'step': 0, 'loss': 1.0}], sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True)


def test_a_run_without_losses_has_an_empty_legend() -> None:
    (legend,) = draw_loss_curves([{"step": 0, "lr": 0.1}, {"step": 1, "lr": 0.2}]).legends
    assert legend.get_texts() == []
