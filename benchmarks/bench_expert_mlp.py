"""expert_mlp against the layers that users write: benchmarks/moe_layers.py.

`python benchmarks/bench_expert_mlp.py [--threads N]` takes turns between the rivals, forward and
backward, which is what a ratio on a shared machine needs, and adds the peak memory of one call.
"""

import argparse
import statistics
import subprocess
import sys
import time

import moe_layers
import pytest
import torch

from m2ae_kernels import expert_mlp

IMPLS = ("eager loop", "m2ae_kernels", "grouped_mm", "all experts")


def inputs_of(T, D, H, E, k, dtype, device="cpu"):
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(T, D),
        "w1": torch.randn(E, H, D) / D**0.5,
        "w2": torch.randn(E, D, H) / H**0.5,
        "weights": torch.rand(T, k),
        "b1": torch.randn(E, H),
        "b2": torch.randn(E, D),
    }
    ids = torch.rand(T, E).argsort(1)[:, :k].to(device)
    made = {
        name: tensor.to(device, torch.float32 if name == "weights" else dtype)
        for name, tensor in tensors.items()
    }
    return made, ids


def call_of(impl, T, D, H, E, k, dtype, device, direction):
    """A function of no arguments, with its own copies of what gets a gradient."""
    given, ids = inputs_of(T, D, H, E, k, dtype, device)
    routing = moe_layers.routing_of(ids, E)
    parts = {name: tensor.requires_grad_() for name, tensor in given.items()}
    if impl == "eager loop":  # one tensor per expert: slices of a stack would pay for its gradient
        for name in ("w1", "w2", "b1", "b2"):
            parts[name] = [part.detach().clone().requires_grad_() for part in given[name]]
    x, w1, w2, weights, b1, b2 = parts.values()
    grad = torch.randn(T, D, device=device).to(dtype)
    leaves = [t for part in parts.values() for t in (part if isinstance(part, list) else [part])]

    def forward():
        if impl == "m2ae_kernels":
            return expert_mlp(x, w1, w2, weights, ids, b1=b1, b2=b2, routing=routing)
        functions = {
            "grouped_mm": moe_layers.torch_grouped_mm,
            "all experts": moe_layers.all_experts,
        }
        rival = functions.get(impl, moe_layers.loop)
        return rival(x, w1, w2, weights, b1, b2, routing)

    def both():
        return torch.autograd.grad(forward(), leaves, grad)

    return forward if direction == "forward" else both


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T,D,H,E,k", [(512, 256, 512, 12, 4)])
def bench_expert_mlp(T, D, H, E, k, impl, direction, device, bench):
    fn = call_of(impl, T, D, H, E, k, torch.float32, device, direction)
    passes = 1 if direction == "forward" else 3
    group = f"expert_mlp {direction} T={T} D={D} H={H} E={E} k={k}"
    bench(group, fn, flops=passes * 4 * T * k * D * H, impl=impl)


def peak_mb(impl, shape, dtype, threads):
    """What one call adds to the largest memory of a fresh process that has made a tiny one."""
    code = (
        "import resource, sys, torch; sys.path[:0] = ['benchmarks']; import bench_expert_mlp as b\n"
        f"torch.set_num_threads({threads})\n"
        f"b.call_of({impl!r}, 8, 64, 64, 2, 1, {dtype}, 'cpu', 'both')()\n"
        f"call = b.call_of({impl!r}, *{shape}, {dtype}, 'cpu', 'both')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "grads = call()\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print((after - before) / 1024, sum(g.nbytes for g in grads) / 2**20)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    peak, gradients = map(float, output.stdout.split())
    return peak - gradients


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--impls", nargs="+", default=list(IMPLS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--directions", nargs="+", default=["forward", "both"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    for T in given.tokens:
        shape = (T, 512, 2048, 12, 4)
        for direction in given.directions:
            calls = {i: call_of(i, *shape, dtype, "cpu", direction) for i in given.impls}
            times = {impl: [] for impl in calls}
            for turn in range(given.rounds + 1):
                for impl, call in calls.items():
                    start = time.perf_counter()
                    call()
                    if turn > 0:
                        times[impl].append(time.perf_counter() - start)
            ours = statistics.median(times["m2ae_kernels"])
            print(f"T, D, H, E, k = {shape}, {given.dtype}, {given.threads} threads, {direction}")
            for impl, seconds in times.items():
                median = statistics.median(seconds)
                peak = f"{peak_mb(impl, shape, dtype, given.threads):8.0f} MB" * (
                    direction == "both"
                )
                print(f"  {impl:14} {median * 1e3:8.1f} ms {median / ours:6.2f}x ours {peak}")


if __name__ == "__main__":
    main()
