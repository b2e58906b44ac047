"""csrc/cuda, host and device code, compiled by g++ and run on CPU tensors: tests/emu is the GPU.

`load()` registers the ops of csrc/cuda/ in the namespace `m2ae_emulated`, with the schemas of
`m2ae_kernels`; tests then put them under the registered ops, like any other implementation.
"""

import functools
import hashlib
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_toolkit
import torch
from torch.utils import cpp_extension

from m2ae_kernels import _library

ORDERS = ("forward", "reverse", "shuffle")
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-fvisibility=hidden", "-DM2AE_EMU", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# A CUDA torch has loaded the real runtime: our own functions must win all the same.
LINK = ["-shared", "-Wl,-Bsymbolic"]


def shuffled():
    """Whether this test runs the emulator in the order that takes ten times as long."""
    return "[emulated-shuffle" in os.environ["PYTEST_CURRENT_TEST"]


def compile_library(sources: list[Path], folder: Path, libraries: list[str]) -> Path:
    """Compile C++ and CUDA files for the emulator; an unchanged set is taken from `folder`."""
    root = cuda_toolkit.ROOT
    includes = [root / "tests/emu", root / "csrc/cuda", *cpp_extension.include_paths()]
    includes.append(sysconfig.get_path("include"))
    flags = [*FLAGS, *(f"-I{path}" for path in includes)]
    flags += ["-isystem", str(cuda_toolkit.HOME / "include")]

    headers = [*(root / "csrc").rglob("*.*h"), *(root / "tests/emu").glob("*.h")]
    state = hashlib.sha256(f"{torch.__version__} {flags} {LINK} {libraries}".encode())
    for path in sorted({*sources, *headers}):
        state.update(path.read_bytes())
    library = folder / f"{state.hexdigest()[:16]}.so"
    if library.exists():
        return library

    def compile_one(source: Path) -> str:
        compiled = str(folder / f"{state.hexdigest()[:16]}.{source.name}.o")
        subprocess.run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", compiled], check=True)
        return compiled

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_one, sources))
    partial = library.with_suffix(".partial")
    subprocess.run(["g++", *LINK, *objects, *libraries, "-o", str(partial)], check=True)
    partial.rename(library)
    return library


@functools.cache
def load(folder: Path) -> None:
    """Register every op that csrc/cuda/ implements as `m2ae_emulated::<op>` for CPU tensors."""
    for op, arguments in _library.SCHEMAS.items():
        torch.library.define(f"m2ae_emulated::{op}", arguments)
    hosts = [path for path in cuda_toolkit.HOSTS if path.name != "module.cpp"]
    sources = [*hosts, *cuda_toolkit.KERNELS, cuda_toolkit.ROOT / "tests/emu/runtime.cpp"]
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    library = compile_library(sources, folder, [*paths, "-ltorch_cpu", "-lc10"])
    torch.ops.load_library(str(library))
