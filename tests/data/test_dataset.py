"""Claims of m2ae.data.dataset."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from m2ae.data.dataset import ManifestDataset

ROWS: list[dict[str, Any]] = [
    {"id": "red", "group": "red", "split": "train", "image": "red.png", "text": ["red", "r"]},
    {"id": "words", "group": "words", "split": "train", "text": ["only words"]},
    {"id": "clear", "group": "clear", "split": "test", "image": "sub/clear.png", "label": "none"},
    {"id": "gray", "group": "gray", "split": "test", "image": "gray.png"},
]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


FILES = {
    "red.png": png(Image.new("RGB", (5, 3), (255, 10, 20))),
    "sub/clear.png": png(Image.new("RGBA", (4, 4), (9, 9, 9, 0))),
    "gray.png": png(Image.new("L", (2, 2), 77)),
}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A manifest, with its images in a folder and in a zip beside it."""
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, data in FILES.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
            archive.writestr(name, data)
    return path


@pytest.fixture(params=[None, "images.zip"], ids=["folder", "zip"])
def images(request: pytest.FixtureRequest, manifest: Path) -> Path | None:
    """Both places that images can be in."""
    return None if request.param is None else manifest.parent / str(request.param)


def pixel(image: Tensor | None) -> list[int]:
    assert image is not None
    values: list[int] = image[:, 0, 0].tolist()
    return values


def test_items_have_what_the_manifest_says(manifest: Path, images: Path | None) -> None:
    data = ManifestDataset(manifest, images)
    assert len(data) == 4
    assert [data[i].id for i in range(4)] == ["red", "words", "clear", "gray"]
    assert data[0].text == ("red", "r")
    assert data[0].label is None
    assert data[2].text == ()
    assert data[2].label == "none"
    assert data[1].image is None


def test_images_are_uint8_channels_first(manifest: Path, images: Path | None) -> None:
    image = ManifestDataset(manifest, images)[0].image
    assert image is not None
    assert image.shape == (3, 3, 5)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert pixel(image) == [255, 10, 20]


def test_transparent_is_white_and_gray_has_three_channels(manifest: Path) -> None:
    data = ManifestDataset(manifest)
    assert pixel(data[2].image) == [255, 255, 255]
    assert pixel(data[3].image) == [77, 77, 77]


def test_a_split_holds_its_rows_only(manifest: Path) -> None:
    data = ManifestDataset(manifest, split="test")
    assert [record.id for record in data.records] == ["clear", "gray"]
    assert [item.id for item in (data[0], data[-1])] == ["clear", "gray"]
    with pytest.raises(IndexError):
        data[2]


def test_the_transform_is_applied_to_images_only(manifest: Path) -> None:
    data = ManifestDataset(manifest, transform=lambda image: 255 - image)
    assert pixel(data[0].image) == [0, 245, 235]
    assert data[1].image is None


def test_an_open_dataset_can_be_pickled(manifest: Path) -> None:
    data = ManifestDataset(manifest, manifest.parent / "images.zip")
    first = pixel(data[0].image)  # opens the zip
    assert pixel(pickle.loads(pickle.dumps(data))[0].image) == first


def test_forked_workers_do_not_share_the_open_zip(tmp_path: Path) -> None:
    # Noise of 120 kB an image: small files would stay in the buffer of a first read.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4, 200, 200, 3), dtype=torch.uint8, generator=generator)
    rows = [ROWS[0] | {"id": str(index), "image": f"{index}.png"} for index in range(4)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for index in range(4):
            archive.writestr(f"{index}.png", png(Image.fromarray(noise[index].numpy())))
    data = ManifestDataset(tmp_path / "manifest.jsonl", tmp_path / "images.zip")
    data[0]  # opens the zip
    # Two workers that shared one file position would soon disturb each other.
    loader = DataLoader(data, 4, sampler=[0, 1, 2, 3] * 25, num_workers=2, collate_fn=list)
    for items in loader:
        for item, expected in zip(items, noise, strict=True):
            assert_close(item.image, expected.permute(2, 0, 1))


def test_a_missing_image_names_row_and_file(manifest: Path, images: Path | None) -> None:
    rows = manifest.read_text().replace("gray.png", "grey.png")
    manifest.write_text(rows)
    # The row of the manifest, not of the split: 4, not 2.
    data = ManifestDataset(manifest, images, split="test")
    with pytest.raises(
        FileNotFoundError, match=r"row 4, field 'image': expected the image grey.png"
    ):
        data[1]


@pytest.mark.parametrize("data", [FILES["red.png"][:-30], b"no image", b""])
def test_a_damaged_image_names_row_and_file(manifest: Path, data: bytes) -> None:
    (manifest.parent / "red.png").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"row 1, field 'image': expected a readable image red.png"
    ):
        ManifestDataset(manifest)[0]


def test_a_damaged_zip_entry_names_row_and_file(manifest: Path) -> None:
    path = manifest.parent / "images.zip"
    path.write_bytes(path.read_bytes().replace(FILES["red.png"], FILES["red.png"][::-1]))
    with pytest.raises(ValueError, match=r"row 1, .* image red.png .*images.zip.*Bad CRC"):
        ManifestDataset(manifest, path)[0]


def test_bad_arguments_are_refused(manifest: Path) -> None:
    with pytest.raises(ValueError, match="expected split to be one of train, val, test or None"):
        ManifestDataset(manifest, split="dev")
    with pytest.raises(ValueError, match=r"expected rows of split 'val' in .*, got none"):
        ManifestDataset(manifest, split="val")
    with pytest.raises(FileNotFoundError, match=r"expected a folder or a zip, got .*nowhere"):
        ManifestDataset(manifest, manifest.parent / "nowhere")
    with pytest.raises(ValueError, match=r"expected a folder or a zip, got .*manifest.jsonl"):
        ManifestDataset(manifest, manifest)
