"""Builds m2ae_kernels._C from csrc/cpu/ and, where torch has CUDA and nvcc is found, _C_cuda from
csrc/cuda/. Both are on LibTorch's stable ABI: built with one torch >= 2.11, they run with others.

Everything else is in pyproject.toml. Without a GPU to look at, TORCH_CUDA_ARCH_LIST is CUDA_ARCHS.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

TORCH_MIN = (2, 11)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
CUDA_ARCHS = "8.0;9.0a;10.0a;12.0+PTX"
COMPILING = {"build", "build_ext", "develop", "editable_wheel", "bdist_wheel", "install"}


def import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"m2ae: expected torch >= 2.11 to build with, got {error}; install the torch that suits"
            " this machine, or build with pip's default isolation"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_MIN:
        raise SystemExit(f"m2ae: expected torch >= 2.11 to build with, got {torch.__version__}")
    return torch


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise SystemExit(
            f"m2ae: expected a C++17 compiler, found no {compiler!r}; install one"
            " (Debian: apt-get install g++) or name yours in CXX"
        )


def find_cuda_home() -> None:
    # torch takes the folder above `which nvcc`, which is wrong where nvcc is a wrapper script.
    if Path("/usr/local/cuda/include/cuda_runtime_api.h").exists():
        os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")


def sources(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).iterdir() if path.suffix in suffixes)


def extensions() -> dict[str, Any]:
    """Needs torch, so only commands that compile call it; metadata and sdist do not."""
    find_cuda_home()
    check_compiler()
    torch = import_torch()
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            # ema_update.cpp and ema_update.cu must not both become ema_update.o
            self.compiler.object_filenames = lambda sources, strip_dir=0, output_dir="": [
                os.path.join(output_dir, f"{source}.o") for source in sources
            ]
            super().build_extensions()

    cxx = [STABLE_ABI, "-O3", "-g0", "-Wall", "-fvisibility=hidden"]
    loops = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]  # let loops vectorize
    headers = sorted(str(path) for path in Path("csrc").rglob("*.*h"))
    modules = [
        cpp_extension.CppExtension(
            "m2ae_kernels._C",
            sources=sources("csrc/cpu", ".cpp"),
            depends=headers,
            extra_compile_args={"cxx": [*cxx, *loops]},
            py_limited_api=True,
        )
    ]
    if torch.version.cuda is not None and cpp_extension.CUDA_HOME is None:
        print(
            f"m2ae: torch {torch.__version__} has CUDA but no nvcc was found: building without CUDA"
            f" kernels; install the CUDA {torch.version.cuda} toolkit or set CUDA_HOME, and rebuild"
        )
    elif torch.version.cuda is not None:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
        modules.append(
            cpp_extension.CUDAExtension(
                "m2ae_kernels._C_cuda",
                sources=sources("csrc/cuda", ".cpp", ".cu"),
                depends=headers,
                extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": [STABLE_ABI, "-O3"]},
                py_limited_api=True,
            )
        )
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension}}


setup(
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    **(extensions() if COMPILING & set(sys.argv) else {}),
)
