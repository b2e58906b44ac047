"""`triton_aot_report.py CAPABILITY [fits | spills]`: compile Triton cases ahead of time, no GPU.

Prints registers, stack, spills and shared memory of each as JSON. In a process of its own, because
Triton's interpreter, which the tests use, excludes its compiler.
"""

import json
import multiprocessing
import os
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
DIVISIBLE_BY_16 = [["tt.divisibility", 16]]


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


def resources(kernel, arguments, constants, options, divisible, capability):
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: arguments.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(names.index(name),): DIVISIBLE_BY_16 for name in divisible},
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
        "of": describe(arguments, constants, options),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spilled_bytes": sum(map(int, spills.groups())),
        "shared_bytes": compiled.metadata.shared,
    }


def describe(arguments, constants, options):
    """The case in a few words: type of the first argument, tile, options that are on."""
    first = re.sub(r"[*<>\[\],]+", " ", next(iter(arguments.values()))).split()[:2]
    first = "descriptor " + first[1] if first[0] == "tensordesc" else first[0]
    on = [name for name, value in constants.items() if value is True or name == "SAME_ID"]
    on = [f"{name}={constants[name]}" if name == "SAME_ID" else name for name in on]
    on += [name for name in ("rnorm_q_ptr", "key_mask_ptr", "level_k_ptr") if name in arguments]
    on = [name for name in on if name not in ("BY_DESCRIPTOR", "FLATTEN")]
    tile = "x".join(str(constants[f"BLOCK_{x}"]) for x in "MNK" if f"BLOCK_{x}" in constants)
    return " ".join([first, tile, f"{options.get('num_warps', 4)} warps", *on])


def report(number):
    case = CASES[number]
    try:
        return resources(*case, CAPABILITY)
    except Exception as error:
        raise RuntimeError(f"{case[0].fn.__name__}: {case[1:]}") from error


if __name__ == "__main__":
    CAPABILITY, *which = int(sys.argv[1]), *sys.argv[2:]
    CASES = triton_cases.cases(CAPABILITY, *which)
    # Forked, because cases hold kernels, which cannot be sent.
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        print(json.dumps(pool.map(report, range(len(CASES)), chunksize=1)))
