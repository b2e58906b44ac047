"""The manifest: one JSON object a line tells what one sample of a data set is.

    {"id": "1F431", "group": "cat face", "split": "train", "image": "1F431.webp",
     "text": ["cat face: animal, pet", "cat face"], "label": "animals-nature/animal-mammal",
     "license": "OFL-1.1"}

`id`, `group` and `split` are required. A row without `image` or without `text` lacks that modality;
it has at least one of them. `label` and `license` are optional.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Record:
    """One row of a manifest.

    Attributes:
        id: unique in the manifest.
        group: leakage key; samples that resemble each other share it, and never cross splits.
        split: "train", "val" or "test".
        image: name of the image below the image folder or inside the zip; None if there is none.
        text: captions, the one for evaluation first; empty if there are none.
        label: class, or None.
        license: SPDX expression, or None.
    """

    id: str
    group: str
    split: str
    image: str | None = None
    text: tuple[str, ...] = ()
    label: str | None = None
    license: str | None = None


_KEYS = tuple(Record.__dataclass_fields__)
_REQUIRED = ("id", "group", "split")


def read_manifest(path: str | Path) -> list[Record]:
    """Read and check a manifest.

    Args:
        path: a JSONL file in UTF-8.

    Returns:
        The records in the order of the file: record i is row i + 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the manifest is empty; a row is not a JSON object; a key is unknown, missing or
            has a wrong value; two rows have the same id; a group is in two splits. The message
            names file, row and field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"manifest: expected a JSONL file, got {path}, which is no file")
    records = []
    first_with: dict[str, int] = {}  # id -> row
    home: dict[str, tuple[str, int]] = {}  # group -> split and row
    with path.open("rb") as lines:
        for row, line in enumerate(lines, start=1):
            where = f"{path}, row {row}"
            record = _parse(line, where)
            if first_with.setdefault(record.id, row) != row:
                raise ValueError(
                    f"{where}, field 'id': expected a new id, got {record.id!r}, which row "
                    f"{first_with[record.id]} has"
                )
            split, earlier = home.setdefault(record.group, (record.split, row))
            if split != record.split:
                raise ValueError(
                    f"{where}, field 'split': expected {split!r}, the split of group "
                    f"{record.group!r} since row {earlier}, got {record.split!r}; a group in two "
                    "splits leaks"
                )
            records.append(record)
    if not records:
        raise ValueError(f"{path}: expected at least one row, got an empty file")
    return records


def _parse(line: bytes, where: str) -> Record:
    try:
        row = json.loads(line)  # from bytes: a wrong encoding is an error of this row
    except ValueError as error:
        raise ValueError(
            f"{where}: expected a JSON object, got {_shown(line)} ({error})"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {_shown(row)}")
    for key in row:
        if key not in _KEYS:
            nearest = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{where}, field {key!r}: expected one of {', '.join(_KEYS)}, got an unknown key; "
                f"did you mean {nearest!r}?"
            )
    for key in _REQUIRED:
        if key not in row:
            raise ValueError(f"{where}, field {key!r}: expected a string, got no such key")
    for key, value in row.items():
        if key != "text" and not (isinstance(value, str) and value):
            raise ValueError(
                f"{where}, field {key!r}: expected a string that is not empty, got {_shown(value)}"
                + ("" if key in _REQUIRED else "; leave out the key if there is none")
            )
    if row["split"] not in SPLITS:
        raise ValueError(
            f"{where}, field 'split': expected one of {', '.join(SPLITS)}, got {row['split']!r}"
        )
    if "image" in row:
        _check_image(row["image"], where)
    if "text" in row:
        row["text"] = _captions(row["text"], where)
    if "image" not in row and "text" not in row:
        raise ValueError(f"{where}: expected at least one of image and text, got neither")
    return Record(**row)


def _check_image(name: str, where: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{where}, field 'image': expected a path below the image folder, got {name!r}"
        )


def _captions(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{where}, field 'text': expected a list of captions, got {_shown(value)}; leave out "
            "the key if there is none"
        )
    for index, caption in enumerate(value):
        if not isinstance(caption, str):
            raise ValueError(
                f"{where}, field 'text': expected strings, got {_shown(caption)} at index {index}"
            )
    return tuple(value)


def _shown(value: object) -> str:
    """The value as it stands in the file, at most 60 characters of it."""
    if isinstance(value, bytes):
        text = value.decode("utf-8", errors="backslashreplace").strip() or "an empty line"
    else:
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
