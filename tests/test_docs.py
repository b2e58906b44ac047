"""Documentation: each example runs by itself, and what the text names exists."""

import re
from pathlib import Path

import pytest

import m2ae
import m2ae_kernels

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
NAMESPACES = (m2ae, m2ae_kernels, m2ae_kernels.nn)
EXAMPLES = [
    pytest.param(example, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, example in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example):
    if "import transformers" in example:
        pytest.importorskip("transformers", minversion="5.9")
    if "m2ae-run/checkpoint" in example:
        pytest.skip("tests/cli/test_cli_connector.py runs it, after the training it follows")
    exec(example, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_exist(page):
    text = page.read_text("utf-8")
    for name in re.findall(r"`nn\.(\w+)", text):
        assert hasattr(m2ae_kernels.nn, name), name
    for name in re.findall(r"`(?:m2ae_kernels\.)?(\w+)\(", text):
        assert any(hasattr(namespace, name) for namespace in NAMESPACES), name
