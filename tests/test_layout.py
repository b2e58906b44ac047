"""The repository keeps its shape: one name per op, every part of an op in its place."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import m2ae_kernels
from m2ae_kernels import _library, ops

ROOT = Path(__file__).parents[1]
BASENAMES = {op: op.removesuffix("_") for op in ops.__all__}  # ema_update_ lives in ema_update.*


def names(pattern: str) -> set[str]:
    """Of the files; what several ops share, or parts of one, begins with an underscore."""
    stems = {path.stem for path in ROOT.glob(pattern)} - {"module"}
    return {stem for stem in stems if not stem.startswith("_")}


def run(*command: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_extensions_are_built():
    # Otherwise every other test would compare the reference with itself.
    assert _library.CPU_EXTENSION is not None
    assert _library.CUDA_EXTENSION is not None or torch.version.cuda is None


@pytest.mark.parametrize("op", ops.__all__)
def test_op_is_complete(op):
    name = BASENAMES[op]
    assert (ROOT / f"m2ae_kernels/ops/{name}.py").exists()
    assert (ROOT / f"tests/test_{name}.py").exists()
    assert (ROOT / f"benchmarks/bench_{name}.py").exists()
    assert f"`{op}`" in (ROOT / "README.md").read_text(), "name the op in README"
    signature = inspect.signature(getattr(m2ae_kernels, op))
    assert inspect.signature(getattr(m2ae_kernels.reference, op)) == signature


@pytest.mark.parametrize("op", ops.__all__)
def test_docstring_tells_the_contract(op):
    function = getattr(m2ae_kernels, op)
    doc = inspect.getdoc(function) or ""
    assert {"Args:", "Returns:", "Raises:"} <= set(doc.split())
    for argument in inspect.signature(function).parameters:
        assert f"{argument}:" in doc or f"{argument}," in doc, argument


@pytest.mark.parametrize("files", ["csrc/cuda/*.cu", "m2ae_kernels/triton/*.py"])
def test_kernel_belongs_to_an_op(files):
    # An op's backward may have a file of its own.
    assert {name.removesuffix("_backward") for name in names(files)} <= set(BASENAMES.values())


@pytest.mark.parametrize("kernel", sorted(names("csrc/cpu/*_kernel.h")))
def test_cpu_kernel_is_in_every_instruction_set(kernel):
    assert (ROOT / f"csrc/cpu/{kernel.removesuffix('_kernel')}.cpp").exists()
    assert f'#include "{kernel}.h"' in (ROOT / "csrc/cpu/isa_table.h").read_text()


@pytest.mark.parametrize("folder", ["m2ae_kernels", "csrc"])
def test_nothing_points_back_to_the_model(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert "import m2ae\n" not in path.read_text()
        assert "from m2ae " not in path.read_text()
        assert "from m2ae." not in path.read_text()


@pytest.mark.parametrize("module", ["triton", "transformers"])
def test_import_does_without(module):
    run("-c", f"import sys, m2ae_kernels; assert '{module}' not in sys.modules")


def test_main_names_the_serving_kernels():
    lines = [line.split() for line in run("-m", "m2ae_kernels").splitlines() if line]
    served = {(row[0], row[1]): row[2] for row in lines if len(row) > 2}
    assert served["ema_update_", "cpu"] == "csrc/cpu/ema_update.cpp"
    assert served["patch_embed", "cpu"] == "reference"
    assert served["torch", torch.__version__] == "(CUDA"


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_instruction_set(isa):
    # A machine without the set runs the best it has, as torch does.
    served = run("-m", "m2ae_kernels", ATEN_CPU_CAPABILITY=isa)
    assert isa != "default" or "ema_update.cpp (default)" in served
    files = ["tests/test_ema_update.py", "tests/test_ema_update_memory.py"]
    tests = [*files, "-k", "registered and not compiles"]
    run("-m", "pytest", "-q", *tests, ATEN_CPU_CAPABILITY=isa)


def test_without_the_extension_the_reference_serves_and_says_so(tmp_path):
    # The compiled module must not be found: a copy of the Python files alone.
    package = tmp_path / "m2ae_kernels"
    for path in (ROOT / "m2ae_kernels").rglob("*.py"):
        copy = package / path.relative_to(ROOT / "m2ae_kernels")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    code = (
        "import sys, warnings; sys.path.insert(0, sys.argv[1])\n"
        # An editable install's finder would still lead to the compiled module.
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch, m2ae_kernels\n"
        "assert m2ae_kernels.__file__.startswith(sys.argv[1])\n"
        "assert any('pip install -e .' in str(w.message) for w in caught), caught\n"
        "x = torch.zeros(3)\n"
        "m2ae_kernels.ema_update_([x], [torch.ones(3)], 0.5)\n"
        "assert x.tolist() == [0.5] * 3\n"
    )
    run("-c", code, str(tmp_path))
