"""A model as a folder: config.json and model.safetensors. No pickle."""

import json
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from m2ae.atomic_files import write_files
from m2ae.config import ModelConfig

CONFIG = "config.json"
TENSORS = "model.safetensors"


class PretrainedModel(nn.Module):
    """A model with a config, which can be written to a folder and read from it."""

    config_type: ClassVar[type[ModelConfig]]
    config: Any  # of config_type

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors with all tensors, an EMA target's included.

        Args:
            folder: made if it does not exist. If writing fails, the files that are there stay.

        Raises:
            OSError: the folder cannot be written to, or the disk is full.
        """
        config = json.dumps(self.config.to_dict(), indent=2) + "\n"
        tensors = {name: x.detach().contiguous() for name, x in self.state_dict().items()}
        write_files(
            folder,
            {
                CONFIG: lambda path: _write_text(path, config),
                TENSORS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            },
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model that `save_pretrained` wrote, on the CPU, in eval mode.

        Args:
            folder: holds config.json and model.safetensors.

        Returns:
            The model.

        Raises:
            FileNotFoundError: one of the files is not there.
            ValueError: the config has an unknown key or a value out of range; or the tensors are
                damaged, missing, unknown or of other shapes, and their names are listed.
            TypeError: a value of the config has another type than its field.
        """
        model = cls(cls.config_type.from_dict(read_config(folder)))
        load_tensors(model, folder)
        return model.eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of config.json.

    Args:
        folder: what `save_pretrained` wrote.

    Returns:
        Keys and values, not yet checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON.
    """
    path = Path(folder) / CONFIG
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"from_pretrained: expected JSON in {path}, got {error}") from error


def load_tensors(model: nn.Module, folder: str | Path) -> None:
    """Fill a model with the tensors of model.safetensors, all of them or none.

    Args:
        model: as its config says.
        folder: what `save_pretrained` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its tensors are not the model's; their names are listed.
    """
    path = Path(folder) / TENSORS
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"from_pretrained: expected complete tensors in {path}, got {error}"
        ) from error
    wanted = model.state_dict()
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [f"{name} is unknown" for name in tensors if name not in wanted]
    faults += [
        f"{name} is {list(tensors[name].shape)} and not {list(x.shape)}"
        for name, x in wanted.items()
        if name in tensors and tensors[name].shape != x.shape
    ]
    if faults:
        raise ValueError(
            f"from_pretrained: expected the model's {len(wanted)} tensors in {path}, got others:"
            f" {'; '.join(faults)}"
        )
    model.load_state_dict(tensors)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
