"""Triton without a GPU: kernels run interpreted, and compile for every target without spilling."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
TRITON = triton.__version__.rpartition(".")[0]
SHARED_MEMORY = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB per block, by compute capability
RESERVED_STACK = {(120, "3.6"): 8}  # bytes, by its assembler for descriptors, not for registers


def compile_ahead(capability, tmp_path, *which):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [sys.executable, str(HERE / "triton_aot_report.py"), str(capability), *which]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def assert_fits(kernel, capability):
    assert kernel["spilled_bytes"] == 0, kernel
    assert kernel["stack_bytes"] <= RESERVED_STACK.get((capability, TRITON), 0), kernel
    assert kernel["shared_bytes"] <= SHARED_MEMORY[capability] * 1024, kernel


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_fit(capability, tmp_path, report):
    kernels = compile_ahead(capability, tmp_path)
    assert {kernel["kernel"] for kernel in kernels} == kernels_in_source()
    for kernel in kernels:
        report(f"sm_{capability:<5}{kernel}")
    for kernel in kernels:
        assert_fits(kernel, capability)


def kernels_in_source():
    """Names of functions that are launched: <name>_kernel. Others are inlined into these."""
    files = HERE.parent.glob("m2ae_kernels/triton/*.py")
    return {
        name
        for file in files
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    }


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_a_kernel_that_fits_is_told_from_one_that_spills(capability, tmp_path):
    for kernel in compile_ahead(capability, tmp_path, "fits"):
        assert_fits(kernel, capability)
    if capability in (80, 90):
        (spilling,) = compile_ahead(capability, tmp_path, "spills")
        assert spilling["spilled_bytes"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_interpreter_runs_kernels_on_cpu_tensors(dtype):
    selftest = importlib.import_module("triton_selftest")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(5, 100, device=device).to(dtype)
    y = torch.empty_like(x)
    selftest.row_softmax[(5,)](x, y, 100, BLOCK_D=128)
    assert_close(y, x.double().softmax(-1).to(dtype))
