"""`triton_aot_report.py CAPABILITY [fits | spills]`: compile Triton cases ahead of time, no GPU.

Prints registers, stack, spills and shared memory of each as JSON. In a process of its own, because
Triton's interpreter, which the tests use, excludes its compiler.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton_cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS_ARE_ALIGNED = [["tt.divisibility", 16]]


def run(tool, *arguments):
    command = [str(TOOLS / tool), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def assemble(ptx, arch):
    """What ptxas says of a file. Triton ships two, and which PTX each of them reads depends."""
    errors = []
    for ptxas in ("ptxas-blackwell", "ptxas"):
        try:
            return run(ptxas, "-v", f"-arch={arch}", str(ptx), "-o", "/dev/null")
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            errors.append(str(getattr(error, "stderr", None) or error))
    raise RuntimeError("\n".join(errors))


def resources(kernel, arguments, constants, options, capability):
    source = ASTSource(
        fn=kernel,
        signature={**arguments, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={
            (i,): POINTERS_ARE_ALIGNED
            for i, dtype in enumerate(arguments.values())
            if dtype.startswith("*")
        },
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = run("cuobjdump", "--dump-resource-usage", str(cubin))
        arch = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.M)[1]
        report = assemble(ptx, arch)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return {
        "kernel": kernel.fn.__name__,
        "dtypes": " ".join(arguments.values()),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spilled_bytes": sum(map(int, spills.groups())),
        "shared_bytes": compiled.metadata.shared,
    }


capability = int(sys.argv[1])
cases = triton_cases.SELFTEST[sys.argv[2]] if len(sys.argv) > 2 else triton_cases.CASES
print(json.dumps([resources(*case, capability) for case in cases]))
