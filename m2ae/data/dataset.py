"""A data set of a manifest and its images: samples as they are, before resizing and tokens."""

import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from m2ae.data.manifest import SPLITS, Record, read_manifest


@dataclass(frozen=True, eq=False)
class Item:
    """One sample.

    Attributes:
        id: as in the manifest.
        image: uint8 [3, H, W], RGB; None if the sample has no image.
        text: captions, the one for evaluation first; empty if the sample has none.
        label: class, or None.
    """

    id: str
    image: Tensor | None
    text: tuple[str, ...]
    label: str | None


class ManifestDataset(Dataset[Item]):
    """The samples of a manifest, in its order.

    Instances can be sent to the workers of a `DataLoader`; each process opens the zip for itself.

    Args:
        manifest: a JSONL file, see `m2ae.data.manifest`.
        images: the folder or the zip that the image names refer to; None: the manifest's folder.
        split: "train", "val" or "test"; None: all rows.
        transform: called with each image, uint8 [3, H, W]; returns the image to use. For
            augmentation use `Collator`, which draws from one generator per sample and epoch.

    Raises:
        FileNotFoundError: `manifest` or `images` does not exist.
        ValueError: an unknown `split`, one without rows, a file `images` that is no zip, or a
            manifest with an error.
    """

    def __init__(
        self,
        manifest: str | Path,
        images: str | Path | None = None,
        split: str | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if split is not None and split not in SPLITS:
            raise ValueError(
                f"ManifestDataset: expected split to be one of {', '.join(SPLITS)} or None, "
                f"got {split!r}"
            )
        self.manifest = Path(manifest)
        self._files = _ImageFiles(self.manifest.parent if images is None else Path(images))
        self.transform = transform
        numbered = enumerate(read_manifest(manifest), start=1)
        self._rows = [
            (row, record) for row, record in numbered if split is None or record.split == split
        ]
        if not self._rows:
            raise ValueError(
                f"ManifestDataset: expected rows of split {split!r} in {manifest}, got none"
            )

    @property
    def records(self) -> list[Record]:
        """The records of the samples, in the order of the samples."""
        return [record for _, record in self._rows]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        """Read one sample.

        Args:
            index: position, -len(self) <= index < len(self).

        Returns:
            The sample, its image decoded and transformed.

        Raises:
            IndexError: `index` is out of range.
            FileNotFoundError: the image is not in the folder or zip.
            ValueError: the image cannot be decoded. Messages name manifest, row and image.
        """
        row, record = self._rows[index]
        image = None
        if record.image is not None:
            image = self._image(row, record.image)
            if self.transform is not None:
                image = self.transform(image)
        return Item(record.id, image, record.text, record.label)

    def _image(self, row: int, name: str) -> Tensor:
        where = f"{self.manifest}, row {row}, field 'image'"
        try:
            data = self._files.read(name)
        except (KeyError, FileNotFoundError) as error:
            raise FileNotFoundError(
                f"{where}: expected the image {name} in {self._files.path}, got no such file"
            ) from error
        except zipfile.BadZipFile as error:
            raise ValueError(_damaged(where, name, self._files.path, error)) from error
        try:
            return _decode(data)
        # Pillow's decoders raise errors of many kinds for damaged bytes.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(_damaged(where, name, self._files.path, error)) from error


def _damaged(where: str, name: str, source: Path, error: Exception) -> str:
    return f"{where}: expected a readable image {name} in {source}, got damaged data ({error})"


def _decode(data: bytes) -> Tensor:
    """The picture as RGB, uint8 [3, H, W]; transparent parts become white."""
    with Image.open(io.BytesIO(data)) as image:
        if image.has_transparency_data:
            paper = Image.new("RGBA", image.size, "white")
            paper.alpha_composite(image.convert("RGBA"))
            pixels = np.array(paper.convert("RGB"))
        else:
            pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class _ImageFiles:
    """Bytes by name from a folder or a zip; the zip is opened once per process, when needed."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"images: expected a folder or a zip, got {path}: no such file")
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError(f"images: expected a folder or a zip, got {path}, which is neither")
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._process = -1

    def read(self, name: str) -> bytes:
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        # A forked worker shares the file position of its parent's handle: it opens its own.
        if self._zip is None or self._process != os.getpid():
            self._zip = zipfile.ZipFile(self.path)
            self._process = os.getpid()
        return self._zip.read(name)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_zip": None, "_process": -1}
