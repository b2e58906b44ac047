"""Rows that take turns in one process, so that a machine's drift hits all of them alike.

`compare(rows, base)` gives median milliseconds, and the median ratio to `base` of the same turn.
`peak_mb(fn)` is how far one call raises the memory of the process, or of the GPU; on the CPU call
it in a fresh process (`in_fresh_process`), because allocators keep what they once had.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def compare(rows, base, device="cpu", seconds=20.0):
    """{name: (median milliseconds, times `base`'s)}; as many turns as fit, 3 to 51."""
    times = {name: [] for name in rows}
    began = time.perf_counter()
    for turn in range(52):
        for name, function in rows.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
        if turn >= 3 and time.perf_counter() - began > seconds:
            break
    times = {name: of[1:] for name, of in times.items()}  # the first turn warms up
    return {
        name: (
            statistics.median(of) * 1e3,
            statistics.median(a / b for a, b in zip(of, times[base], strict=True)),
        )
        for name, of in times.items()
    }


def peak_mb(function, device="cpu"):
    """Megabytes that one call adds to what is in use, at its peak."""
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts from here
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1e6


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def in_fresh_process(script, *arguments):
    """The number that `script`, called with these arguments, prints last."""
    command = [sys.executable, script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        return float("nan")  # out of memory, most of the time: the row says so
    return float(result.stdout.split()[-1])


def machine(device):
    """One line to print over a table."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu()
    return f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"


def _cpu():
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
