"""Shared fixtures. Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors."""

import contextlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path

import cuda_toolkit
import emulator
import pytest
import torch

import m2ae_kernels
from m2ae_kernels import _library
from m2ae_kernels._library import DEVICES

ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the first `import triton`
if importlib.util.find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # built for another torch: to transformers it is as good as absent
        sys.modules["torchvision"] = None  # type: ignore[assignment]
# Tests are small: a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


REPORT = pytest.StashKey[list[str]]()


@pytest.fixture
def report(request):
    """A function that takes lines to show after the run, whether the test passes or not."""
    return request.config.stash.setdefault(REPORT, []).append


def pytest_terminal_summary(terminalreporter, config):
    if lines := config.stash.get(REPORT, []):
        terminalreporter.section("measured")
        for line in sorted(lines):
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    # Fills every torch.empty, also those inside C++ kernels, with NaN: unwritten outputs show.
    torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_generate_tests(metafunc):
    """One `impl` per kernel that the op of the test module has."""
    if "impl" not in metafunc.fixturenames:
        return
    op = op_of(metafunc.module)
    kernels = ["registered", "reference"]
    if (ROOT / f"csrc/cuda/{op}.cu").exists():
        kernels += [f"emulated-{order}" for order in emulator.ORDERS]
    if (ROOT / f"m2ae_kernels/triton/{op}.py").exists():
        kernels.append("triton")
    kernels.append(pytest.param("cuda", marks=pytest.mark.gpu))
    metafunc.parametrize("impl", kernels, indirect=True)


@pytest.fixture
def impl(request, monkeypatch):
    """(function, device): the op the test module is named after, served by each of its kernels.

    registered: the kernel a CPU caller gets. cuda: the one a CUDA caller gets. The others are put
    under the registered op, so tests see them as callers would: the reference; the CUDA C++ kernel,
    with its host code, run by tests/emu on CPU tensors in three thread orders; the Triton kernel,
    interpreted where there is no GPU.
    """
    basename = op_of(request.module)
    op = next(op for op in m2ae_kernels.ops.__all__ if op.removesuffix("_") == basename)
    kernel = request.param
    device = "cuda" if kernel == "cuda" or (kernel == "triton" and GPU) else "cpu"
    with contextlib.ExitStack() as served:
        for part in (part for part in (op, f"{op}_backward") if part in _library.SCHEMAS):
            function = None
            if kernel == "reference":
                function = _library.REFERENCES[part]
            if kernel == "triton":
                pytest.importorskip("triton")
                module = importlib.import_module(f"m2ae_kernels.triton.{basename}")
                function = getattr(module, part)
            if kernel.startswith("emulated"):
                monkeypatch.setenv("M2AE_EMU_ORDER", kernel.removeprefix("emulated-"))
                function = emulated(part, request.config.cache)
            if function is not None:
                served.enter_context(_library.implementation(part, function, DEVICES[device]))
        yield getattr(m2ae_kernels, op), device


@pytest.fixture
def on_gpu(impl):
    """The op of `impl`, where that runs on a GPU."""
    op, device = impl
    if device != "cuda":
        pytest.skip("a kernel of the CPU")
    return op


@pytest.fixture
def no_sync():
    """A function after which waiting for the GPU is an error, until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def op_of(module):
    """The op's basename: that of test_<op>.py, or of test_<op>_<aspect>.py."""
    name = module.__name__.rpartition("test_")[2]
    basenames = (op.removesuffix("_") for op in m2ae_kernels.ops.__all__)
    return next(op for op in basenames if name == op or name.startswith(f"{op}_"))


def emulated(op, cache):
    if not cuda_toolkit.HAS_HEADERS:
        pytest.skip("needs the CUDA headers and g++")
    emulator.load(cache.mkdir("emulator"))
    return getattr(torch.ops.m2ae_emulated, op).default
