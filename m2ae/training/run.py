"""One run from recipe to checkpoint: load data, build the model, train, save."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from m2ae.atomic_files import write_text
from m2ae.data.collate import Collator
from m2ae.data.dataset import Item, ManifestDataset
from m2ae.data.emoji import emoji
from m2ae.data.manifest import read_manifest
from m2ae.data.tokenizer import Tokenizer
from m2ae.data.transforms import crop_and_jitter
from m2ae.models.m2ae import M2AE
from m2ae.training.determinism import set_determinism
from m2ae.training.log import RunLog
from m2ae.training.recipe import DataConfig, Recipe
from m2ae.training.trainer import Trainer


@dataclass
class Run:
    """What a run made."""

    model: M2AE  # trained, in eval mode
    items: dict[str, list[Item]]  # "train", "val" and "test" samples, in memory
    collator: Collator  # for evaluation: first caption, middle of the image
    log: RunLog
    samples_per_second: float  # in training


def run_recipe(recipe: Recipe, folder: str | Path, *, quiet: bool = False) -> Run:
    """Train a model and write it down.

    Args:
        recipe: what to do.
        folder: gets recipe.yaml, log.jsonl and checkpoint/ (config.json, model.safetensors); made
            if it does not exist.
        quiet: no progress on the terminal.

    Returns:
        The model, its data and its log.

    Raises:
        OSError: the folder cannot be written to, or a file of the data is missing.
        ValueError: the data do not fit the recipe.
        FloatingPointError: the loss is not finite.
    """
    folder = Path(folder)
    resolved = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
    write_text(folder / "recipe.yaml", resolved)
    set_determinism(recipe.train.seed)

    tokenizer = Tokenizer(recipe.data.tokenizer or None)
    image, text = recipe.model.image, recipe.model.text
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"recipe.model.text.vocab_size: expected at least the tokenizer's"
            f" {tokenizer.vocab_size}, got {text.vocab_size}"
        )
    items = {split: load_items(recipe.data, split) for split in ("train", "val", "test")}

    def collator(train: bool) -> Collator:
        augment = crop_and_jitter if train and recipe.data.augment else None
        seed = recipe.train.seed
        return Collator(tokenizer, image.img_size, train, seed, text.context_length, augment)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = M2AE(recipe.model).to(device)
    evaluating = collator(train=False)
    trainer = Trainer(
        model, recipe.train, items["train"], collator(train=True), items["val"], evaluating
    )
    with RunLog(folder / "log.jsonl", recipe.train.steps, quiet=quiet) as log:
        samples_per_second = trainer.fit(log)
    if trainer.shortened > 0:
        warnings.warn(
            f"{trainer.shortened} captions lost tokens: they are longer than"
            f" context_length = {text.context_length}",
            stacklevel=2,
        )
    model.eval()
    model.save_pretrained(folder / "checkpoint")
    return Run(model, items, evaluating, log, samples_per_second)


def load_items(data: DataConfig, split: str) -> list[Item]:
    """The samples of a split, decoded, in memory.

    Args:
        data: where they come from.
        split: "train", "val" or "test".

    Returns:
        The samples in the order of the manifest; none if the manifest has none of this split.

    Raises:
        OSError: the manifest, or an image of it, is missing.
        ValueError: the manifest or an image is damaged; the row is named.
    """
    if data.manifest == "emoji":
        dataset = emoji(split)
    elif all(record.split != split for record in read_manifest(data.manifest)):
        return []
    else:
        dataset = ManifestDataset(data.manifest, data.images or None, split)
    return [dataset[i] for i in range(len(dataset))]
