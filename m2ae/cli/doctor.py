"""Print versions and kernels, and check that one seed gives one result on this machine."""

import argparse
import json
import platform
from importlib.metadata import version
from typing import Any

PACKAGES = ("torch", "numpy", "pillow", "safetensors", "tokenizers", "matplotlib", "rich", "PyYAML")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print JSON only")


def run(options: argparse.Namespace) -> int:
    """Run the command; the status is 1 if something is wrong."""
    facts = examine()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        for title, rows in facts.items():
            print(title)
            for name, value in rows.items():
                print(f"  {name:28} {value}")
    wrong = [text for text in facts["checks"].values() if not text.startswith("ok")]
    return 1 if wrong else 0


def examine() -> dict[str, dict[str, Any]]:
    """What decides whether and how things run here.

    Returns:
        "versions", "machine", "kernels" (op and device to what serves it) and "checks", whose
        values begin with "ok" or say what is wrong.
    """
    import torch

    import m2ae
    from m2ae_kernels import _library

    versions = {"m2ae": m2ae.__version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in PACKAGES}
    machine = {
        "system": platform.platform(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    kernels = {
        f"{op} {device}": _library.served_by(op, device)
        for op in _library.SCHEMAS
        for device in _library.DEVICES
    }
    is_built = _library.CPU_EXTENSION is not None
    checks = {
        "compiled CPU kernels": "ok" if is_built else "missing: run `pip install -e .`",
        "one seed, one result": _check_determinism(),
        "shipped data": _check_data(),
    }
    return {"versions": versions, "machine": machine, "kernels": kernels, "checks": checks}


def _check_determinism() -> str:
    import torch

    from m2ae.config import M2AEConfig
    from m2ae.masking import draw_masks
    from m2ae.models.m2ae import M2AE
    from m2ae.training.determinism import set_determinism

    config = M2AEConfig.preset("m2ae_tiny")
    results = []
    for _ in range(2):
        set_determinism(0)
        model = M2AE(config)
        size = config.image.img_size
        inputs = {
            "pixel_values": torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8),
            "input_ids": torch.randint(3, config.text.vocab_size, (4, 9)),
        }
        masks = draw_masks(config.jepa, config.image.grid, range(4), seed=0, epoch=0)
        loss = model(inputs, masks=masks).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((loss.item(), torch.cat(gradients)))
    (first_loss, first), (second_loss, second) = results
    same = first_loss == second_loss and torch.equal(first, second)
    return "ok: loss and gradients agree bit for bit" if same else "two runs differ"


def _check_data() -> str:
    from m2ae.data.emoji import emoji

    try:
        return f"ok: {len(emoji())} emoji"
    except (OSError, ValueError) as error:
        return str(error)
