"""README: its examples run, its two commands come first, its table names every op."""

import re
from pathlib import Path

from m2ae.config import M2AEConfig
from m2ae.models.m2ae import M2AE
from m2ae_kernels import ops

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_examples_run(tmp_path, monkeypatch):
    M2AE(M2AEConfig.preset("m2ae_tiny")).save_pretrained(tmp_path / "m2ae-demo/checkpoint")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(examples) == 2
    names = {}
    for example in examples:
        exec(example, names)
    assert names["tokens"].shape == (8, 98, 768)
    assert names["routed"].shape == (8, 98, 768)
    assert names["loss"].isfinite()
    assert names["cosines"].shape == (4, 4)
    assert names["pixels"].shape == (4, 3, 48, 48)


def test_the_first_two_commands_install_and_run_then_install_and_test():
    commands = re.findall(r"^pip install.*$", README, re.M)
    assert commands[:2] == ["pip install -e . && m2ae demo", 'pip install -e ".[test]" && pytest']


def test_every_op_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \|", README, re.M)
    assert sorted(rows) == sorted(ops.__all__)


def test_nothing_is_left_to_fill_in():
    assert "MEASURED" not in README
