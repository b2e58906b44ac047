"""A training run as data: which model, which data, how long and how fast.

A recipe is a YAML file. One with `connector` has the fields of `ConnectorRecipe` as its keys, any
other those of `Recipe`. `model` takes the fields of `M2AEConfig`, and `preset` to start from; what
is written beside it replaces the preset's values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from m2ae.config import ConnectorConfig, ConnectorLossConfig, M2AEConfig
from m2ae.dataclass_io import from_dict, hint, to_dict
from m2ae.training.alternation import Direction, check_directions


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from."""

    manifest: str = "emoji"  # a manifest.jsonl, or "emoji", the data set in the package
    images: str = ""  # folder or zip of the manifest's images; "" = the manifest's folder
    tokenizer: str = ""  # a tokenizer.json; "" = the one in the package
    augment: bool = True  # random crops and colors in training


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained."""

    steps: int = 1000  # optimizer steps, at least 1
    batch_size: int = 128  # samples of a step; the last, smaller batch of an epoch is left out
    lr: float = 1e-3  # peak learning rate
    final_lr: float = 0.01  # learning rate of the last step / peak
    warmup_steps: int = 50  # steps to the peak
    weight_decay: float = 0.05  # of matrices, as AdamW decouples it
    betas: tuple[float, float] = (0.9, 0.98)  # decay of AdamW's moments
    clip_norm: float = 1.0  # largest norm of the gradient; 0 = no limit
    log_every: int = 10  # steps between lines of the log
    eval_every: int = 100  # steps between evaluations on the validation split; 0 = none
    seed: int = 0  # of weights, order, captions, crops and masks

    def __post_init__(self) -> None:
        rules = {
            "steps": (self.steps >= 1, "1 or more"),
            "batch_size": (self.batch_size >= 2, "2 or more: one sample has no negatives"),
            "lr": (self.lr > 0, "a number above 0"),
            "final_lr": (0 <= self.final_lr <= 1, "a share in [0, 1]"),
            "warmup_steps": (self.warmup_steps >= 0, "0 or more"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "clip_norm": (self.clip_norm >= 0, "0 or more"),
            "log_every": (self.log_every >= 1, "1 or more"),
            "eval_every": (self.eval_every >= 0, "0 or more"),
            "seed": (0 <= self.seed < 2**32, "0 <= seed < 2**32"),
        }
        for name, (is_right, expected) in rules.items():
            if not is_right:
                got = getattr(self, name)
                raise ValueError(f"TrainConfig.{name}: expected {expected}, got {got!r}")


@dataclass(frozen=True)
class FeaturesConfig:
    """Where features of frozen encoders come from."""

    manifest: str = "emoji"  # a manifest.jsonl, or "emoji", the data set in the package
    features: str = ""  # a safetensors file for a manifest of one's own; "" with "emoji"

    def __post_init__(self) -> None:
        if (self.manifest == "emoji") != (self.features == ""):
            raise ValueError(
                "FeaturesConfig.features: expected a file with a manifest of one's own, and none"
                f" with 'emoji', got {self.features!r} with {self.manifest!r}"
            )


@dataclass(frozen=True)
class Recipe:
    """A whole run of an M2AE; `m2ae train` writes it, resolved, beside what it made."""

    model: M2AEConfig = field(default_factory=M2AEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested dictionaries and lists."""
        return to_dict(self)


@dataclass(frozen=True)
class ConnectorRecipe:
    """A whole run of a connector."""

    connector: ConnectorConfig
    data: FeaturesConfig = field(default_factory=FeaturesConfig)
    # source and target modality, trained in turn, a step each
    directions: tuple[Direction, ...] = (("image", "text"), ("text", "image"))
    loss: ConnectorLossConfig = field(default_factory=ConnectorLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_directions(self.directions, self.connector.dims)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested dictionaries and lists."""
        return to_dict(self)


def load_recipe(
    name_or_path: str | Path, overrides: Sequence[str] = ()
) -> Recipe | ConnectorRecipe:
    """Read a recipe.

    Args:
        name_or_path: a YAML file, or the name of one of m2ae/configs/recipe/.
        overrides: "section.field=value" each, value in YAML; they replace what the file says.

    Returns:
        The recipe, checked; a ConnectorRecipe if it says `connector`.

    Raises:
        FileNotFoundError: no such file and no such name; the nearest name is given.
        ValueError: the file is not YAML, a key is unknown (the nearest is named), a value is out
            of range, or an override is not of that form.
        TypeError: a value has another type than its field.
    """
    text = _read(name_or_path)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name_or_path}: expected YAML, got {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{name_or_path}: expected keys and values, got {data!r}")
    for override in overrides:
        _override(data, override)
    _check_sections(data)
    if "connector" in data:
        return from_dict(ConnectorRecipe, data, path="recipe")
    model = dict(data.get("model") or {})
    if "preset" in model:
        preset = M2AEConfig.preset(model.pop("preset")).to_dict()
        model = _merge(preset, model)
    return from_dict(Recipe, {**data, "model": model}, path="recipe")


def _check_sections(data: Mapping[str, Any]) -> None:
    """Refuse what no recipe has, so that a misspelt `connector` is not taken for an M2AE's."""
    if "model" in data and "connector" in data:
        raise ValueError("recipe: expected one of 'model' and 'connector', got both")
    sections = {f.name for kind in (Recipe, ConnectorRecipe) for f in fields(kind)}
    for key in data:
        if key not in sections:
            known = hint(key, sections)
            raise ValueError(f"recipe: expected only known keys, got {key!r}; {known}")


def _read(name_or_path: str | Path) -> str:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path.read_text(encoding="utf-8")
    folder = resources.files("m2ae") / "configs" / "recipe"
    shipped = {file.name.removesuffix(".yaml"): file for file in folder.iterdir()}
    if path.name not in shipped:
        known = hint(path.name, shipped)
        raise FileNotFoundError(
            f"recipe: expected a .yaml file or a shipped recipe, got {str(name_or_path)!r}; {known}"
        )
    return shipped[path.name].read_text(encoding="utf-8")


def _override(data: dict[str, Any], override: str) -> None:
    keys, equals, value = override.partition("=")
    *sections, name = keys.split(".")
    if not equals or not all((*sections, name)):
        raise ValueError(f"--set: expected section.field=value, got {override!r}")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ValueError(f"--set: expected a section in {keys!r}, got a value at {section!r}")
    data[name] = yaml.safe_load(value)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        is_section = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merge(base[key], value) if is_section else value
    return merged
