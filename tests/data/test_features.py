"""Features as data: the shipped ones, one's own, and which items are one thing."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from m2ae.data.emoji import emoji, emoji_features
from m2ae.data.features import emoji_feature_sets, read_feature_sets, same_items

SPLITS = ("train", "train", "val", "test", "train")


def write_manifest(folder, splits=SPLITS):
    rows = [
        {"id": f"item {i}", "group": f"group {i}", "split": split, "text": ["words"]}
        | ({"label": "odd"} if i % 2 else {})
        for i, split in enumerate(splits)
    ]
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_features(folder, **tensors):
    save_file(tensors, folder / "features.safetensors")
    return folder / "features.safetensors"


def test_shipped_features_are_those_of_the_splits() -> None:
    sets = emoji_feature_sets()
    ids, image, text = emoji_features()
    row_of = {name: row for row, name in enumerate(ids)}
    assert {split: len(items) for split, items in sets.items()} == {
        "train": 1307, "val": 143, "test": 449,
    }  # fmt: skip
    for split, items in sets.items():
        records = emoji(split).records
        assert items.ids == [record.id for record in records]
        assert items.labels == [record.label for record in records]
        rows = [row_of[name] for name in items.ids]
        assert torch.equal(items.features["text"], text[rows])
        shares = image[rows] / image[rows].sum(1, keepdim=True)  # squares of unit rows of roots
        assert_close(items.features["image"].square(), shares)


def test_shipped_images_that_are_equal_are_one_thing() -> None:
    sets = emoji_feature_sets()
    same = torch.cat([items.same for items in sets.values()])
    _, image, _ = emoji_features()
    assert len(same.unique()) == len(image.unique(dim=0)) == 1886  # 13 flags drawn as another's
    train = sets["train"]
    rows = (train.same[:, None] == train.same).sum(1) > 1
    names = {record.id: record.text[1] for record in emoji("train").records}
    assert rows.any()
    assert all(names[train.ids[row]].startswith("flag: ") for row in rows.nonzero().flatten())


def test_one_thing_is_what_any_modality_cannot_tell_apart() -> None:
    image = torch.tensor([[0.0], [1.0], [2.0], [1.0], [3.0], [4.0]])
    text = torch.tensor([[5.0], [6.0], [6.0], [7.0], [8.0], [5.0]])
    # 1 and 3 by image, 1 and 2 by text, so 2 and 3 through 1; 0 and 5 by text.
    assert same_items([image, text]).tolist() == [0, 1, 1, 1, 4, 0]


def test_a_long_chain_is_one_thing() -> None:
    n = 40  # i and i + 1 are equal in one modality, in turn: the number travels step by step
    steps = torch.arange(n)
    order = torch.randperm(n)
    image, text = ((steps + shift) // 2 for shift in (0, 1))
    assert not same_items([image[order, None], text[order, None]]).any()


def test_features_of_ones_own(tmp_path):
    image, text = torch.randn(5, 3), torch.randn(5, 2).half()
    sets = read_feature_sets(write_manifest(tmp_path), write_features(tmp_path, a=image, b=text))
    assert sets["train"].ids == ["item 0", "item 1", "item 4"]
    assert sets["train"].labels == [None, "odd", None]
    assert torch.equal(sets["train"].features["a"], image[[0, 1, 4]])
    assert torch.equal(sets["test"].features["b"], text[[3]].float())
    assert torch.equal(sets["val"].same, torch.tensor([2]))


def test_a_split_may_be_empty(tmp_path):
    manifest = write_manifest(tmp_path, ["train"] * 3)
    sets = read_feature_sets(manifest, write_features(tmp_path, a=torch.randn(3, 2)))
    assert [len(sets[split]) for split in ("train", "val", "test")] == [3, 0, 0]


@pytest.mark.parametrize(
    "rows,message",
    [
        (torch.zeros(4, 3), "expected 'a' of floats [5, d], a row for each of the manifest, got"),
        (torch.zeros(5), "got torch.float32 [5]"),
        (torch.zeros(5, 3, dtype=torch.int64), "got torch.int64 [5, 3]"),
        (
            torch.zeros(5, 3).index_fill(0, torch.tensor(3), torch.nan),
            "expected finite 'a', got NaN or infinity for id 'item 3'",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_feature_sets(write_manifest(tmp_path), write_features(tmp_path, a=rows))


def test_a_file_without_features_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a tensor for each modality, got none"):
        read_feature_sets(write_manifest(tmp_path), write_features(tmp_path))


def test_a_missing_or_cut_file_is_an_error(tmp_path):
    manifest = write_manifest(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a safetensors file, got .*nowhere"):
        read_feature_sets(manifest, tmp_path / "nowhere")
    path = write_features(tmp_path, a=torch.zeros(5, 3))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="expected complete tensors"):
        read_feature_sets(manifest, path)
