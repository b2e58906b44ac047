"""`python -m m2ae_kernels`: versions, and which kernel serves each op on each device, and why."""

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import m2ae_kernels
from m2ae_kernels import _library


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"


def main() -> None:
    """Print the versions that decide, then a row per op and device."""
    has_triton = importlib.util.find_spec("triton") is not None
    rows = {
        "m2ae_kernels": m2ae_kernels.__version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "triton": _version("triton") if has_triton else "not installed",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": _gpu(),
    }
    for name, fact in rows.items():
        print(f"{name:12}  {fact}")
    print()
    width = max(map(len, _library.SCHEMAS))
    for op in _library.SCHEMAS:
        for device in _library.DEVICES:
            print(f"{op:{width}}  {device:4}  {_library.served_by(op, device)}")


if __name__ == "__main__":
    main()
