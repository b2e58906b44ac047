"""Data: manifests, images, captions, batches, and the data set that ships with the package."""

from m2ae.data.collate import Batch, Collator
from m2ae.data.dataset import Item, ManifestDataset
from m2ae.data.emoji import emoji, emoji_features
from m2ae.data.features import FeatureSet, emoji_feature_sets, read_feature_sets
from m2ae.data.manifest import Record, read_manifest
from m2ae.data.tokenizer import Encoding, Tokenizer
from m2ae.data.transforms import generator_for

__all__ = [
    "Batch",
    "Collator",
    "Encoding",
    "FeatureSet",
    "Item",
    "ManifestDataset",
    "Record",
    "Tokenizer",
    "emoji",
    "emoji_feature_sets",
    "emoji_features",
    "generator_for",
    "read_feature_sets",
    "read_manifest",
]
