"""What the model's files may import: nothing above them, and public kernels only."""

import ast
from pathlib import Path

import pytest

import m2ae.config

PACKAGE = Path(m2ae.config.__file__).parent
FILES = [
    path
    for folder in ("models", "modalities", "losses")
    for path in sorted((PACKAGE / folder).glob("*.py"))
]
FILES += [PACKAGE / f"{name}.py" for name in ("config", "dataclass_io", "masking", "outputs")]
KERNELS = {
    "m2ae_kernels": {"patch_embed", "info_nce_loss", "ema_update_"},
    "m2ae_kernels.nn": {"GroupedExperts", "MoE", "TopKRouter"},
}


def imports(path):
    """Every (module, name) that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_model_knows_nothing_above_it(path):
    below = {"atomic_files", "config", "dataclass_io", "losses", "masking", "modalities", "models"}
    for module, name in imports(path):
        package, _, rest = module.partition(".")
        if package == "m2ae":
            assert (rest or name).partition(".")[0] in below | {"outputs"}, f"{module}.{name}"
        if package == "m2ae_kernels":
            assert name in KERNELS.get(module, ()), f"{module}.{name}"
