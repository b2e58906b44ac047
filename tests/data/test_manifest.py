"""Claims of m2ae.data.manifest."""

import json
from pathlib import Path
from typing import Any

import pytest

from m2ae.data.manifest import Record, read_manifest

ROW = {"id": "a", "group": "g", "split": "train", "image": "a.png", "text": ["an a", "a"]}


def write(folder: Path, *rows: dict[str, Any] | str) -> Path:
    path = folder / "manifest.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in ROW.items() if key not in keys}


def test_rows_become_records_in_order(tmp_path: Path) -> None:
    other = ROW | {"id": "b", "label": "x/y", "license": "MIT", "text": ["日本"]}
    assert read_manifest(write(tmp_path, ROW, other)) == [
        Record("a", "g", "train", "a.png", ("an a", "a")),
        Record("b", "g", "train", "a.png", ("日本",), "x/y", "MIT"),
    ]


def test_a_missing_key_is_a_missing_modality(tmp_path: Path) -> None:
    no_image, no_text = read_manifest(
        write(tmp_path, without("image"), without("text") | {"id": "b"})
    )
    assert no_image.image is None
    assert no_image.text == ("an a", "a")
    assert no_text.image == "a.png"
    assert no_text.text == ()


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"id": "b"', r"row 2: expected a JSON object, got \{\"id\": \"b\" \("),
        ("", "row 2: expected a JSON object, got an empty line"),
        ("[1, 2]", r"row 2: expected a JSON object, got \[1, 2\]"),
        (ROW | {"id": "b", "txet": []}, "row 2, field 'txet': .* did you mean 'text'?"),
        (ROW | {"id": "b", "9": 1}, "row 2, field '9': expected one of id, group, .*unknown key"),
        (without("id"), "row 2, field 'id': expected a string, got no such key"),
        (without("group"), "row 2, field 'group': expected a string, got no such key"),
        (without("split"), "row 2, field 'split': expected a string, got no such key"),
        (ROW | {"id": 7}, "row 2, field 'id': expected a string that is not empty, got 7$"),
        (ROW | {"id": "b", "group": ""}, "field 'group': expected a string that is not empty"),
        (ROW | {"id": "b", "image": None}, "'image': .* got null; leave out the key"),
        (ROW | {"id": "b", "label": 3}, "'label': expected a string that is not empty, got 3;"),
        (ROW | {"id": "b", "split": "dev"}, "'split': expected one of train, val, test, got 'dev'"),
        (ROW | {"id": "b", "image": "/a.png"}, "'image': expected a path below the image folder"),
        (ROW | {"id": "b", "image": "../a.png"}, "'image': expected a path below .*got '../a.png'"),
        (ROW | {"id": "b", "text": "cat"}, "'text': expected a list of captions, got \"cat\""),
        (ROW | {"id": "b", "text": []}, r"'text': expected a list of captions, got \[\]; leave"),
        (ROW | {"id": "b", "text": ["x", 1]}, "'text': expected strings, got 1 at index 1"),
        (without("image", "text") | {"id": "b"}, "row 2: expected at least one of image and text"),
        (ROW, "row 2, field 'id': expected a new id, got 'a', which row 1 has"),
        (
            ROW | {"id": "b", "split": "test"},
            "row 2, field 'split': expected 'train', the split of group 'g' since row 1, got 'te",
        ),
    ],
)
def test_an_error_names_file_row_and_field(
    tmp_path: Path, row: dict[str, Any] | str, message: str
) -> None:
    path = write(tmp_path, ROW, row)
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(f"{path}, row 2")


def test_a_long_value_is_shown_short(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got \"x{56}\.\.\.; leave"):
        read_manifest(write(tmp_path, ROW | {"text": "x" * 1000}))


def test_bytes_that_are_not_utf8_are_an_error_of_their_row(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(ValueError, match="row 2: expected a JSON object, got"):
        read_manifest(path)


def test_an_empty_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.touch()
    with pytest.raises(ValueError, match="expected at least one row, got an empty file"):
        read_manifest(path)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a JSONL file, got .*none.jsonl"):
        read_manifest(tmp_path / "none.jsonl")
