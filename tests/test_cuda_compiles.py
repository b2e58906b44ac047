"""nvcc compiles every .cu for every target without spilling; g++ every host file. Needs no GPU."""

import re
import subprocess
import sysconfig

import cuda_toolkit
import pytest
from torch.utils import cpp_extension

MAX_REGISTERS = 64  # 4 blocks of 256 threads per multiprocessor
# Threads that hold 32 numbers; the shared memory of those rows has no room for more threads.
MORE_REGISTERS = {"topk_gating": 96, "topk_gating_backward": 96}
SOURCES = pytest.mark.parametrize("source", cuda_toolkit.KERNELS, ids=lambda path: path.name)


@pytest.mark.slow
@pytest.mark.skipif(not cuda_toolkit.HAS_NVCC, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["80", "90a", "100a", "120"])
@SOURCES
def test_kernel_does_not_spill(source, arch, tmp_path, report):
    for name, stack, spilled, registers in resources(source, arch, tmp_path / "kernel.o"):
        report(f"sm_{arch:5}{name}: {registers} registers, {spilled} bytes spilled")
        assert (stack, spilled) == (0, 0), name
        assert registers <= MORE_REGISTERS.get(source.stem, MAX_REGISTERS), name


def resources(source, arch, compiled):
    """(kernel, stack bytes, spilled bytes, registers) of each kernel, as ptxas reports them."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [cuda_toolkit.NVCC, "-std=c++17", "-O3", target, "-Xptxas=-v", "-c", str(source)]
    result = subprocess.run([*command, "-o", str(compiled)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pattern = r"entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    pattern += r"(\d+) bytes spill loads.*?Used (\d+) registers"
    found = re.findall(pattern, result.stderr, re.S)
    assert found, result.stderr
    for mangled, stack, stored, loaded, registers in found:
        name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
        short = re.search(r"(\w+(<.*>)?)\(", name)
        yield short[1] if short else name, int(stack), int(stored) + int(loaded), int(registers)


@pytest.mark.skipif(not cuda_toolkit.HAS_HEADERS, reason="needs the CUDA headers and g++")
@pytest.mark.parametrize("source", cuda_toolkit.HOSTS, ids=lambda path: path.name)
def test_host_uses_the_stable_abi_only(source, tmp_path):
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-DUSE_CUDA"]
    command += ["-fvisibility=hidden"]  # as setup.py does
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030b0000"]
    command += [f"-I{folder}" for folder in folders]
    command += ["-isystem", str(cuda_toolkit.HOME / "include")]
    compiled = str(tmp_path / "host.o")
    subprocess.run([*command, "-c", str(source), "-o", compiled], check=True)
    undefined = subprocess.run(["nm", "-C", "-u", compiled], capture_output=True, text=True).stdout
    assert "Py" in undefined or "aoti" in undefined  # nm has read the file
    assert not re.findall(r"\b(?:at|c10|torch::(?!stable|headeronly))::\S+", undefined)


@pytest.mark.skipif(not cuda_toolkit.HAS_NVCC, reason="needs nvcc")
def test_a_spilling_kernel_is_seen(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spill(float* x) {\n"
        "  float a[64];\n"
        "  for (int i = 0; i < 64; ++i) a[i] = x[i * 1024 + threadIdx.x];\n"
        "  for (int k = 0; k < 64; ++k)\n"
        "    for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i + k) % 64] + a[63 - i];\n"
        "  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = a[i];\n"
        "}\n"
    )
    ((_, stack, spilled, _),) = resources(source, "90a", tmp_path / "spill.o")
    assert stack > 0 or spilled > 0
