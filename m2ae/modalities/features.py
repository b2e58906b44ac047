"""Features of any encoder, brought to the scale a connector is trained on.

    z = (x - mean) / scale

Mean over training items, per channel; scale is one number, the root mean square of what is left, so
angles between centered features stay as the encoder made them. Per channel it would blow up those
that hardly vary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2ae.atomic_files import write_files

FILE = "standardization.safetensors"


@dataclass(frozen=True, eq=False)
class Standardization:
    """Mean [d_m] and scale (0-d, above 0) of each modality m's features."""

    mean: dict[str, Tensor]
    scale: dict[str, Tensor]

    @classmethod
    def measure(cls, features: Mapping[str, Tensor]) -> "Standardization":
        """What training items have.

        Args:
            features: [n, d_m] of each modality, n >= 1.

        Returns:
            Their mean and scale.

        Raises:
            ValueError: all items have one feature in a modality: there is nothing to tell apart.
        """
        for name, rows in features.items():
            if (rows == rows[0]).all():
                raise ValueError(
                    f"Standardization: expected {name} features that vary, got one for all items"
                )
        mean = {name: rows.mean(dim=0) for name, rows in features.items()}
        scale = {
            name: (rows - mean[name]).square().mean().sqrt() for name, rows in features.items()
        }
        return cls(mean, scale)

    def __call__(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Center and scale.

        Args:
            features: [..., d_m] of some of the modalities.

        Returns:
            The same shapes.
        """
        return {
            name: (rows - self.mean[name]) / self.scale[name] for name, rows in features.items()
        }

    def save(self, folder: str | Path) -> None:
        """Write standardization.safetensors into a folder, whole or not at all."""
        tensors = {f"mean.{name}": mean.contiguous() for name, mean in self.mean.items()}
        tensors |= {f"scale.{name}": scale for name, scale in self.scale.items()}
        write_files(folder, {FILE: lambda path: save_file(tensors, path)})

    @classmethod
    def load(cls, folder: str | Path) -> "Standardization":
        """What `save` wrote.

        Args:
            folder: holds standardization.safetensors.

        Returns:
            Mean and scale, on the CPU.

        Raises:
            FileNotFoundError: the file is not there.
            ValueError: it is damaged, or holds something else.
        """
        path = Path(folder) / FILE
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: expected complete tensors, got {error}") from error
        parts: dict[str, dict[str, Tensor]] = {"mean": {}, "scale": {}}
        for name, tensor in tensors.items():
            part, _, modality = name.partition(".")
            parts.setdefault(part, {})[modality] = tensor
        if set(parts) != {"mean", "scale"} or set(parts["mean"]) != set(parts["scale"]):
            raise ValueError(
                f"{path}: expected a mean and a scale for each modality, got {sorted(tensors)}"
            )
        return cls(**parts)
