"""The torch.library namespace `m2ae_kernels`: how an op is declared and which kernels serve it."""

import contextlib
import functools
import importlib
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAMESPACE = "m2ae_kernels"
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # device type: dispatch key


def _load(extension: str) -> tuple[ModuleType | None, str]:
    """Import a compiled module, which registers its kernels; or say why that was not possible."""
    try:
        return importlib.import_module(f"m2ae_kernels.{extension}"), ""
    except ImportError as error:
        needs = " with nvcc on the PATH or CUDA_HOME set" if extension == "_C_cuda" else ""
        warnings.warn(
            f"m2ae_kernels: {extension} not loaded ({error}); using the slow PyTorch reference. "
            f"Build it with `pip install -e .`{needs}",
            stacklevel=2,
        )
        return None, f"{extension} not loaded: {error}"


CPU_EXTENSION, _no_cpu = _load("_C")
CUDA_EXTENSION, _no_cuda = (
    _load("_C_cuda") if torch.version.cuda is not None else (None, "this torch has no CUDA")
)

SCHEMAS: dict[str, str] = {}  # every op and its arguments, in order of definition
REFERENCES: dict[str, Callable[..., Any]] = {}  # what serves it where no kernel does
TRITON: dict[str, str] = {}  # the file whose Triton kernel serves it on CUDA


def define(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Declare `m2ae_kernels::<schema>`; `reference` serves every device without its own kernel."""
    op = schema[: schema.index("(")]
    name = f"{NAMESPACE}::{op}"
    SCHEMAS[op] = schema[len(op) :]
    REFERENCES[op] = reference
    torch.library.define(name, SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd", reference)
    torch.library.register_fake(name, fake)
    _register_triton(op)


def _triton_file(op: str) -> str | None:
    """The file with the op's Triton kernel, if it has one; that of its backward is there, too."""
    basename = op.removesuffix("_").removesuffix("_backward")
    file = Path(__file__).parent / f"triton/{basename}.py"
    return f"m2ae_kernels/triton/{basename}.py" if file.exists() else None


def _register_triton(op: str) -> None:
    """Let the op's Triton kernel serve it on CUDA; Triton is imported by the first call."""
    file = _triton_file(op)
    if file is None or importlib.util.find_spec("triton") is None:
        return
    module = file.removesuffix(".py").replace("/", ".")

    @functools.cache
    def kernel() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), op)

    torch.library.impl(f"{NAMESPACE}::{op}", "CUDA", lambda *args: kernel()(*args))
    TRITON[op] = file


@contextlib.contextmanager
def implementation(op: str, function: Callable[..., Any], key: str) -> Iterator[None]:
    """Within the block, the registered `op` runs `function` for dispatch key `key`. For tests."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*[Oo]verrid")  # which is the purpose
            library.impl(op, function, key, allow_override=True)
        yield
    finally:
        library._destroy()


def served_by(op: str, device: str) -> str:
    """The file whose kernel runs for `op` on `device`; or that the reference does, and why."""
    name = f"{NAMESPACE}::{op}"
    if device == "cuda" and op in TRITON:
        return TRITON[op]
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, DEVICES[device]):
        registrations = torch._C._dispatch_dump(name)
        found = re.search(
            rf"^{DEVICES[device]}: registered at \S*?(csrc/\S+?):\d+ ", registrations, re.M
        )
        kernel = found[1] if found else "a Python function"
        if device == "cpu" and CPU_EXTENSION is not None:
            kernel += f" ({CPU_EXTENSION.INSTRUCTION_SET})"
        return kernel
    missing = {"cpu": _no_cpu, "cuda": _no_cuda}[device]
    if device == "cuda" and _triton_file(op) is not None:
        missing = "triton is not installed"
    return f"reference ({missing or f'no kernel for {device}'})"
