"""The data set that ships with the package: 1,899 emoji, drawn and described.

Drawings are from Noto Color Emoji, captions from emojibase; `emoji/LICENSES.md` has the licenses.
About 69 % of the items are for training, 8 % for validation and 24 % for testing; variants of one
emoji (gender, age, hair, direction, equal flags) are in one split.
"""

from importlib import resources
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from m2ae.data.dataset import ManifestDataset
from m2ae.data.manifest import read_manifest


def emoji(split: str | None = None) -> ManifestDataset:
    """The shipped data set.

    Args:
        split: "train", "val" or "test"; None: all.

    Returns:
        Items with an image of 96 x 96 pixels, several captions and the label "group/subgroup".

    Raises:
        ValueError: an unknown `split`.
    """
    folder = _folder()
    return ManifestDataset(folder / "manifest.jsonl", folder / "images.zip", split)


def emoji_features() -> tuple[list[str], Tensor, Tensor]:
    """What two frozen encoders make of the shipped data set.

    The image encoder was trained with ImageNet labels: say so beside results.

    Returns:
        The ids of all n items, in the order of the manifest; image features of EfficientNet-Lite0,
        float32 [n, 1280], averaged over places and not normalized, >= 0; text
        features of all-MiniLM-L6-v2 for the first captions, float32 [n, 384], of length 1. They
        are stored as float16.
    """
    folder = _folder()
    features = load_file(folder / "features.safetensors")
    ids = [record.id for record in read_manifest(folder / "manifest.jsonl")]
    return ids, features["image"].float(), features["text"].float()


def _folder() -> Path:
    return Path(str(resources.files("m2ae.data").joinpath("emoji")))
