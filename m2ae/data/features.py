"""Features of frozen encoders as data: what a connector is trained on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from m2ae.data.emoji import emoji, emoji_features
from m2ae.data.manifest import SPLITS, Record, read_manifest

EMOJI_ENCODERS = (
    "image by EfficientNet-Lite0, which was trained with ImageNet labels; text by all-MiniLM-L6-v2"
)


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """n items with features of every modality.

    Attributes:
        ids: as in the manifest.
        labels: classes; None where an item has none.
        features: float32 [n, d_m] for each modality m.
        same: int64 [n], equal for items that are one thing; see `same_items`.
    """

    ids: list[str]
    labels: list[str | None]
    features: dict[str, Tensor]
    same: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def emoji_feature_sets() -> dict[str, FeatureSet]:
    """The shipped features, of EfficientNet-Lite0 for "image" and all-MiniLM-L6-v2 for "text".

    Image features are square roots divided by their norm: the roots of averages over places are
    nearer to normal than the averages. EMOJI_ENCODERS belongs beside every result on them.

    Returns:
        "train", "val" and "test".
    """
    _, image, text = emoji_features()
    features = {"image": F.normalize(image.sqrt(), dim=1), "text": text}
    return _split(emoji().records, features)


def read_feature_sets(manifest: str | Path, features: str | Path) -> dict[str, FeatureSet]:
    """Features of one's own.

    Args:
        manifest: a JSONL file, see `m2ae.data.manifest`; ids, labels and splits are read.
        features: a safetensors file with a tensor of floats for each modality, by its name: [n,
            d_m], row i for row i of the manifest.

    Returns:
        "train", "val" and "test"; a split without rows is empty.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: the manifest is damaged, or the tensors are not as above.
    """
    records = read_manifest(manifest)
    path = Path(features)
    if not path.is_file():
        raise FileNotFoundError(f"features: expected a safetensors file, got {path}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected complete tensors, got {error}") from error
    if not tensors:
        raise ValueError(f"{path}: expected a tensor for each modality, got none")
    for name, rows in tensors.items():
        if rows.dim() != 2 or len(rows) != len(records) or not rows.is_floating_point():
            raise ValueError(
                f"{path}: expected {name!r} of floats [{len(records)}, d], a row for each of the"
                f" manifest, got {rows.dtype} {list(rows.shape)}"
            )
        if not rows.isfinite().all():
            row = int((~rows.isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(
                f"{path}: expected finite {name!r}, got NaN or infinity for id {records[row].id!r}"
            )
    return _split(records, {name: rows.float() for name, rows in tensors.items()})


def same_items(features: Iterable[Tensor]) -> Tensor:
    """Which items are one thing: those with equal features in a modality, and theirs in turn.

    Whoever sees that modality alone cannot tell them apart. Equal captions, or one picture for two
    flags, are so.

    Args:
        features: [n, d_m] of each modality, at least one.

    Returns:
        int64 [n], the first row of each item's component.
    """
    groups = [rows.unique(dim=0, return_inverse=True)[1] for rows in features]  # [n] each
    same = torch.arange(len(groups[0]))
    while True:  # at most n times: a component's least number reaches all of it
        before = same
        for group in groups:
            least = torch.full_like(same, len(same)).scatter_reduce(0, group, same, "amin")
            same = least[group]
        if torch.equal(same, before):
            return same


def _split(records: list[Record], features: Mapping[str, Tensor]) -> dict[str, FeatureSet]:
    same = same_items(features.values())
    sets = {}
    for split in SPLITS:
        rows = [row for row, record in enumerate(records) if record.split == split]
        sets[split] = FeatureSet(
            ids=[records[row].id for row in rows],
            labels=[records[row].label for row in rows],
            features={name: tensor[rows] for name, tensor in features.items()},
            same=same[rows],
        )
    return sets
