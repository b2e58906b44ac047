"""Claims of m2ae.data.emoji and of the files of the shipped data set."""

import hashlib
import json
import zipfile
from collections import Counter, defaultdict
from importlib import resources
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close

from m2ae.data.emoji import emoji, emoji_features
from m2ae.data.manifest import Record, read_manifest
from m2ae.data.tokenizer import Tokenizer

FOLDER = Path(str(resources.files("m2ae.data").joinpath("emoji")))


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """All rows of the shipped manifest."""
    return read_manifest(FOLDER / "manifest.jsonl")


def test_the_set_is_small_enough_to_ship() -> None:
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size <= 12e6


def test_every_image_decodes_to_rgb_of_96_pixels() -> None:
    data = emoji()
    assert len(data) == 1899
    for index in range(len(data)):
        image = data[index].image
        assert image is not None
        assert image.shape == (3, 96, 96)
        # Something drawn, and white corners, but for the noise of lossy compression.
        assert (image[:, [0, 0, -1, -1], [0, -1, 0, -1]] >= 230).all()
        assert image.float().std() > 5


def test_the_zip_holds_the_images_of_the_manifest(records: list[Record]) -> None:
    with zipfile.ZipFile(FOLDER / "images.zip") as archive:
        assert archive.namelist() == [record.image for record in records]


def test_splits_have_the_documented_shares(records: list[Record]) -> None:
    counts = Counter(record.split for record in records)
    assert {split: len(emoji(split)) for split in counts} == counts
    shares = {split: count / len(records) for split, count in counts.items()}
    # Groups fall by hash: with about 1,650 of them a share's deviation is about 1.1 points, and
    # groups of up to 30 items widen it.
    assert shares == pytest.approx({"train": 0.70, "val": 0.07, "test": 0.23}, abs=0.03)


def test_no_group_is_in_two_splits(records: list[Record]) -> None:
    splits = defaultdict(set)
    for record in records:
        splits[record.group].add(record.split)
    assert all(len(found) == 1 for found in splits.values())


def test_no_image_is_in_two_splits(records: list[Record]) -> None:
    splits = defaultdict(set)
    with zipfile.ZipFile(FOLDER / "images.zip") as archive:
        for record in records:
            assert record.image is not None
            splits[archive.read(record.image)].add(record.split)
    assert len(splits) < len(records)  # there are equal images, such as flags: the test can fail
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize(
    "labels",
    [
        ("person running", "man running", "woman running: facing right"),
        ("health worker", "man health worker", "woman health worker"),
        ("man: bald", "woman: red hair", "person", "old woman"),
        ("family", "family: man, woman, girl, boy"),
        ("merman", "mermaid"),
        ("Santa Claus", "Mrs. Claus", "Mx Claus"),
        ("left-facing fist", "right-facing fist"),
        ("flag: Norway", "flag: Bouvet Island"),
    ],
)
def test_variants_are_in_one_group(records: list[Record], labels: tuple[str, ...]) -> None:
    groups = {record.text[1]: record.group for record in records}
    assert len({groups[label] for label in labels}) == 1


def test_different_concepts_are_in_different_groups(records: list[Record]) -> None:
    groups = {record.text[1]: record.group for record in records}
    labels = ["red heart", "white heart", "left arrow", "right arrow", "keycap: #", "keycap: *"]
    assert len({groups[label] for label in labels}) == len(labels)


def test_the_first_caption_is_label_and_tags(records: list[Record]) -> None:
    for record in records:
        full, label, *others = record.text
        assert full.startswith(f"{label}: ")
        assert set(full.removeprefix(f"{label}: ").split(", ")) <= {label, *others}
        assert len(set(record.text)) == len(record.text)


def test_tones_components_and_indicators_are_left_out(records: list[Record]) -> None:
    tones = {f"1F3F{digit}" for digit in "BCDEF"}
    for record in records:
        parts = record.id.split("-")
        assert not tones.intersection(parts)
        assert not (len(parts) == 1 and 0x1F1E6 <= int(parts[0], 16) <= 0x1F1FF)
        assert record.label is not None
        assert record.label.split("/")[0] != "component"
    assert Counter(str(record.label).split("/")[0] for record in records)["flags"] > 250


def test_no_full_caption_is_longer_than_the_context(records: list[Record]) -> None:
    assert Tokenizer()([record.text[0] for record in records]).shortened == 0


def test_features_are_in_the_order_of_the_manifest(records: list[Record]) -> None:
    ids, image, text = emoji_features()
    assert ids == [record.id for record in records]
    assert (image.shape, image.dtype) == ((1899, 1280), torch.float32)
    assert (text.shape, text.dtype) == ((1899, 384), torch.float32)
    with safe_open(FOLDER / "features.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["ids_sha256"] == hashlib.sha256("\n".join(ids).encode()).hexdigest()
    assert "ImageNet labels" in about["image"]


def test_features_have_the_documented_ranges() -> None:
    _, image, text = emoji_features()
    assert image.isfinite().all()
    assert image.min() >= 0
    # 384 roundings to float16, each of at most 2^-11 of its value.
    assert_close(text.norm(dim=1), torch.ones(len(text)), rtol=0, atol=2**-11)


def recall_at_10(image: Tensor, text: Tensor, train: Tensor, test: Tensor) -> float:
    """Share of test images whose text is among the ten nearest to a ridge map of the image."""
    x, y = image - image[train].mean(0), text - text[train].mean(0)
    gram = x[train].T @ x[train] + 0.1 * torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, x[train].T @ y[train])  # [1280, 384]
    scores = F.normalize(x[test] @ weight, dim=1) @ F.normalize(y[test], dim=1).T  # [n, n]
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    return (rank < 10).float().mean().item()


def test_a_linear_map_finds_texts_of_unseen_images(records: list[Record]) -> None:
    _, image, text = emoji_features()
    image = F.normalize(image.sqrt(), dim=1)
    train = torch.tensor([record.split == "train" for record in records])
    test = torch.tensor([record.split == "test" for record in records])
    n = int(test.sum())
    recall = recall_at_10(image, text, train, test)
    chance = 10 / n  # about 0.022
    assert recall > chance + 10 * (chance * (1 - chance) / n) ** 0.5
    # Neighbors in the manifest resemble each other, so rows that are off by one give far more than
    # chance: 0.38, where the right order gives 0.51. The right order must win by three standard
    # errors of a recall near one half, sqrt(0.25 / n).
    off_by_one = max(recall_at_10(image, text.roll(shift, 0), train, test) for shift in (-1, 1))
    assert recall > off_by_one + 3 * (0.25 / n) ** 0.5


@pytest.mark.parametrize("name", ["Noto-OFL-1.1", "emojibase-MIT", "Unicode-3.0", "Apache-2.0"])
def test_license_texts_are_shipped_and_named(name: str) -> None:
    assert f"licenses/{name}.txt" in (FOLDER / "LICENSES.md").read_text("utf-8")
    assert len((FOLDER / "licenses" / f"{name}.txt").read_text("utf-8")) > 1000


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="expected split to be one of train, val, test or None"):
        emoji("dev")
