"""expert_mlp's loops of every instruction set, in the tests that go through all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_instruction_set(isa):
    # A machine without the set runs the best it has, as torch does.
    tests = ["tests/test_expert_mlp.py", "-k", "registered and (activations or every or all)"]
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": isa}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
