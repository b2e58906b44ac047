"""Files that are either the old ones or the new ones, never half of each."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


def write_files(folder: str | Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Write files into a folder so that a failure leaves the old ones as they were.

    Every file is first written under a temporary name in the same folder and flushed to disk; only
    when all are complete are they renamed, in order.

    Args:
        folder: made if it does not exist.
        writers: for each file name, a function that writes the file at the path it is given.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as directory:
        for name, write in writers.items():
            path = Path(directory) / name
            write(path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for name in writers:
            (Path(directory) / name).replace(folder / name)


def write_text(path: str | Path, text: str) -> None:
    """Write one UTF-8 text file, as `write_files` does.

    Args:
        path: its folder is made if it does not exist.
        text: the whole content.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    write_files(path.parent, {path.name: lambda file: _write(file, text)})


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
