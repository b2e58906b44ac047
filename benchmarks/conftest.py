"""`bench(group, fn, ...)` times one implementation of one op; rows of a group are comparable.

Median wall time of 50 rounds after 10 warm-up rounds (fewer, where those would take more than two
seconds), synchronized inside the timed function, one CPU thread. On CUDA the time of the kernels
alone, by events over a batch of launches, and the peak memory go into `extra_info` beside GB/s or
TFLOP/s. A row named "eager" in a group is what the others' ratio in the closing table refers to.
"""

import json
import os
import statistics
import time
from pathlib import Path

import pytest
import torch

ROWS = pytest.StashKey[list[dict]]()
ROUNDS = 50
SECONDS = 2.0  # for the rounds of one row


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)  # a shared machine's other cores are not ours to measure


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def events_us(fn, launches=20):
    """Median time on the device of one call, in microseconds, without the gaps of the host."""
    times = []
    for _ in range(11):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Keeps the device busy while the host queues the calls, so no launch gap is timed.
        torch.cuda._sleep(2_000_000)
        start.record()
        for _ in range(launches):
            fn()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


@pytest.fixture
def bench(benchmark, device, request):
    """A function that times `fn` as a row of `group`."""

    def run(group, fn, *, bytes_moved=None, flops=None, impl=None):
        def timed():
            fn()
            if device == "cuda":
                torch.cuda.synchronize()

        group = f"{group} [{device}]"
        benchmark.group = group
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.extra_info["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        rounds = ROUNDS
        if not benchmark.disabled:
            timed()
            start = time.perf_counter()
            timed()
            rounds = int(min(max(SECONDS / (time.perf_counter() - start), 3), ROUNDS))
        warmups = 0 if benchmark.disabled else min(10, rounds)
        benchmark.pedantic(timed, rounds=rounds, iterations=1, warmup_rounds=warmups)
        if not benchmark.stats:  # under --benchmark-disable
            return
        seconds = benchmark.stats.stats.median
        row = {"group": group, "impl": impl or request.node.callspec.id, "us": seconds * 1e6}
        if device == "cuda":
            # 20, but no more than take 10 ms: what is longer has no gaps worth hiding.
            row["kernel_us"] = events_us(fn, launches=int(min(max(0.01 / seconds, 1), 20)))
            row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
            seconds = row["kernel_us"] / 1e6
        if bytes_moved is not None:
            row["GB/s"] = bytes_moved / seconds / 1e9
        if flops is not None:
            row["TFLOP/s"] = flops / seconds / 1e12
        benchmark.extra_info.update({k: round(v, 3) for k, v in row.items() if k not in TEXT})
        request.config.stash.setdefault(ROWS, []).append(row)

    return run


TEXT = ("group", "impl")


def pytest_terminal_summary(terminalreporter, config):
    """One line per row, with its speed as a ratio to the group's "eager"."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("ratios to eager, one CPU thread")
    for group in dict.fromkeys(row["group"] for row in rows):
        members = [row for row in rows if row["group"] == group]
        eager = next((row for row in members if row["impl"].startswith("eager")), None)
        terminalreporter.write_line(group)
        for row in members:
            time = "kernel_us" if "kernel_us" in row else "us"
            row["ratio"] = eager[time] / row[time] if eager else float("nan")
            facts = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in TEXT)
            terminalreporter.write_line(f"  {row['impl']:24} {facts}")
    if path := os.environ.get("BENCH_ROWS"):
        Path(path).write_text(json.dumps(rows, indent=1))
