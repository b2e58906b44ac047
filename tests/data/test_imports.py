"""The place of m2ae.data in the layers."""

import ast
from importlib import resources
from pathlib import Path

ALLOWED = {"torch", "numpy", "PIL", "tokenizers", "safetensors", "m2ae.data"}
STANDARD = {"collections", "dataclasses", "difflib", "hashlib", "importlib", "io", "json", "math"}
STANDARD |= {"os", "pathlib", "typing", "zipfile"}


def test_data_imports_nothing_above_it() -> None:
    files = sorted(Path(str(resources.files("m2ae.data"))).glob("*.py"))
    assert len(files) == 8
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in names:
                top = (
                    ".".join(name.split(".")[:2]) if name.startswith("m2ae") else name.split(".")[0]
                )
                assert top in ALLOWED | STANDARD, f"{file.name} imports {name}"
