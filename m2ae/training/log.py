"""What a run tells: one JSON object per line in a file, and a line on the terminal."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_EVERY = 15.0  # seconds between lines where there is no terminal


class RunLog:
    """The log of one run: a context manager around its steps.

    The file is the truth; the terminal shows its latest line. On a terminal that is one progress
    line with the time left, elsewhere a plain line every 15 seconds, both on standard error.

    Args:
        path: the file, overwritten.
        steps: of the run.
        quiet: nothing on the terminal.
    """

    def __init__(self, path: str | Path, steps: int, *, quiet: bool = False) -> None:
        self.rows: list[dict[str, Any]] = []
        self._steps = steps
        self._start = self._last_line = time.monotonic()
        self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115  closed by __exit__
        console = Console(stderr=True)
        self._quiet = quiet
        self._progress: Progress | None = None
        if console.is_terminal and not quiet:
            columns = (
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=console)
            self._task = self._progress.add_task("", total=steps, facts="")

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        """Append a row.

        Args:
            row: "step" and numbers; it is on disk when this returns.
        """
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def advance(self, step: int, facts: dict[str, float]) -> None:
        """Show that a step is done.

        Args:
            step: the step that is done, from 0.
            facts: what to show beside it.
        """
        text = "  ".join(f"{name} {value:.3g}" for name, value in facts.items())
        if self._progress is not None:
            self._progress.update(self._task, completed=step + 1, facts=text)
            return
        now = time.monotonic()
        is_last = step + 1 == self._steps
        if self._quiet or not (is_last or now - self._last_line >= PLAIN_EVERY):
            return
        self._last_line = now
        left = (now - self._start) / (step + 1) * (self._steps - step - 1)
        print(f"step {step + 1}/{self._steps}  {text}  {left:.0f} s left", file=sys.stderr)  # noqa: T201
