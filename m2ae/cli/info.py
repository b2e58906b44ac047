"""Print a model's shapes, parameters and compression ratios, or a connector's sizes."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2ae.config import ConnectorConfig, M2AEConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "model", nargs="?", default="m2ae_base", help="a preset, or the folder of a checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    facts = describe(options.model)
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, rows in facts.items():
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in rows.items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
        console.print(table)
    return 0


def describe(model: str) -> dict[str, dict[str, Any]]:
    """Facts about a preset or a checkpoint; no weights are made or read.

    Args:
        model: a preset's name, or a folder with a config.json.

    Returns:
        Of an M2AE "shapes", "parameters" and "compression ratios"; of a connector "shapes",
        "parameters" and "experts".

    Raises:
        ValueError: there is no such preset; the nearest is named. Or the config has unknown keys.
        OSError: the folder has no config.json.
    """
    from m2ae.config import ConnectorConfig, M2AEConfig

    if not Path(model).is_dir():
        return _m2ae(M2AEConfig.preset(model))
    data = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    if "dims" in data:  # as only a connector's config has
        return _connector(ConnectorConfig.from_dict(data))
    return _m2ae(M2AEConfig.from_dict(data))


def _m2ae(config: "M2AEConfig") -> dict[str, dict[str, Any]]:
    import torch

    from m2ae.models.m2ae import M2AE

    with torch.device("meta"):
        built = M2AE(config)
    counts = built.parameter_counts()
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    image, text_config, latent = config.image, config.text, config.latent_dim
    N, T = image.num_patches, text_config.context_length
    shapes = {
        "image": f"(B, 3, {image.img_size}, {image.img_size})",
        "patch tokens": f"(B, {N}, {image.embed_dim})",
        "pooled image": f"(B, {image.embed_dim})",
        "token ids": f"(B, {T})",
        "token embeddings": f"(B, {T}, {text_config.width_in})",
        "text tokens": f"(B, {T}, {text_config.width})",
        "pooled text": f"(B, {text_config.width})",
        "fusion": f"(B, {image.embed_dim + text_config.width}) to (B, {latent})",
        "latent": f"(B, {latent})",
    }
    ratios = {name: f"{ratio:.1f} : 1" for name, ratio in built.compression_ratios().items()}
    parameters = {**counts, "all": sum(counts.values()), "trained": trained}
    return {"shapes": shapes, "parameters": parameters, "compression ratios": ratios}


def _connector(config: "ConnectorConfig") -> dict[str, dict[str, Any]]:
    import torch

    from m2ae.models.connector import MoEConnector

    with torch.device("meta"):
        built = MoEConnector(config)
    parameters: dict[str, Any] = {}
    for name, parameter in built.named_parameters():
        part = ".".join(name.split(".")[:2]) if name.startswith("moe.") else name.split(".")[0]
        parameters[part] = parameters.get(part, 0) + parameter.numel()
    parameters["all"] = sum(parameters.values())
    shapes = {f"{name} latents": f"(B, N, {width})" for name, width in config.dims.items()}
    shapes |= {f"{name} prediction": f"(B, {width})" for name, width in config.dims.items()}
    shapes["query and key"] = f"(B, {config.hidden_size})"
    per_token = f"{config.top_k} of {config.num_experts}"
    return {"shapes": shapes, "parameters": parameters, "experts": {"per token": per_token}}
