"""Figures to PNG files."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from m2ae.atomic_files import write_files

DPI = 150  # pixels per inch of every PNG


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to a PNG file, as a whole or not at all.

    The same figure gives the same bytes with the same matplotlib.

    Args:
        figure: what to write; 150 pixels per inch, on white.
        path: ends in ".png"; its folder is made if it does not exist.

    Raises:
        ValueError: `path` does not end in ".png".
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"save_figure: expected a path that ends in .png, got {path.name!r}")
    FigureCanvasAgg(figure)

    def write(file: Path) -> None:
        figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})

    write_files(path.parent, {path.name: write})
