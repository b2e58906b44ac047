"""One run of a connector from recipe to checkpoint: load features, standardize, train, save."""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from m2ae.atomic_files import write_text
from m2ae.data.features import FeatureSet, emoji_feature_sets, read_feature_sets
from m2ae.modalities.features import Standardization
from m2ae.models.connector import MoEConnector
from m2ae.training.connector_trainer import ConnectorTrainer, Pairs
from m2ae.training.determinism import set_determinism
from m2ae.training.log import RunLog
from m2ae.training.recipe import ConnectorRecipe, FeaturesConfig


@dataclass
class ConnectorRun:
    """What a run made."""

    model: MoEConnector  # trained, in eval mode
    items: dict[str, FeatureSet]  # "train", "val" and "test", as the files have them
    standardize: Standardization  # what the model was trained behind
    log: RunLog
    steps_of: dict[tuple[str, str], int]  # steps that trained each direction
    samples_per_second: float  # in training


def run_connector_recipe(
    recipe: ConnectorRecipe, folder: str | Path, *, quiet: bool = False
) -> ConnectorRun:
    """Train a connector and write it down.

    Args:
        recipe: what to do.
        folder: gets recipe.yaml, log.jsonl and checkpoint/ (config.json, model.safetensors,
            standardization.safetensors); made if it does not exist.
        quiet: no progress on the terminal.

    Returns:
        The connector, its data and its log.

    Raises:
        OSError: the folder cannot be written to, or a file of the data is missing.
        ValueError: the data do not fit the recipe.
        FloatingPointError: the loss is not finite.
    """
    folder = Path(folder)
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    set_determinism(recipe.train.seed)

    items = load_feature_sets(recipe.data)
    _check_widths(recipe, items["train"])
    standardize = Standardization.measure(items["train"].features)

    def pairs(split: str) -> Pairs:
        return standardize(items[split].features), items[split].same

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MoEConnector(recipe.connector).to(device)
    trainer = ConnectorTrainer(
        model, recipe.train, recipe.loss, recipe.directions, pairs("train"), pairs("val")
    )
    with RunLog(folder / "log.jsonl", recipe.train.steps, quiet=quiet) as log:
        samples_per_second = trainer.fit(log)
    model.eval()
    model.save_pretrained(folder / "checkpoint")
    standardize.save(folder / "checkpoint")
    return ConnectorRun(model, items, standardize, log, trainer.steps_of, samples_per_second)


def load_feature_sets(data: FeaturesConfig) -> dict[str, FeatureSet]:
    """Items of "train", "val" and "test" where a recipe says.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged or does not fit the other.
    """
    if data.manifest == "emoji":
        return emoji_feature_sets()
    return read_feature_sets(data.manifest, data.features)


def _check_widths(recipe: ConnectorRecipe, items: FeatureSet) -> None:
    found = {name: rows.shape[1] for name, rows in items.features.items()}
    if found != recipe.connector.dims:
        raise ValueError(
            f"recipe.connector.dims: expected the features' {found}, got {recipe.connector.dims}"
        )
