"""What the benchmarks of moe_sort, moe_permute and moe_unpermute share: inputs, calls, the program.

python benchmarks/bench_<op>.py [--device cuda] [--threads 2] [--tokens 1024,4096] [--dims 512]
    [--experts 12x4] [--dtypes float32,bfloat16] [--directions both] [--seconds 20]

prints a table of rows that took turns: milliseconds, and how many times ours. On Linux CPUs run it
also with GLIBC_TUNABLES=glibc.malloc.mmap_threshold=17179869184:\
glibc.malloc.trim_threshold=17179869184, which lets eager PyTorch keep its temporaries.
"""

import argparse
from dataclasses import dataclass

import side_by_side
import torch
from torch import Tensor

from m2ae_kernels import MoERouting, moe_sort

OURS = "m2ae_kernels"
DIRECTIONS = ("forward", "both")
# (T, D, E, k, dtype): on a GPU M3-JEPA's batch, and Qwen3's experts.
SHAPES = {
    "cpu": ((1024, 512, 12, 4, torch.float32), (4096, 512, 12, 4, torch.float32)),
    "cuda": ((61680, 2048, 12, 4, torch.bfloat16), (16384, 2048, 128, 8, torch.bfloat16)),
}


@dataclass
class Inputs:
    """T tokens of D numbers, k of E experts each, and both ways to say where they go."""

    E: int
    ids: Tensor  # [T, k] int32
    x: Tensor  # [T, D]
    weights: Tensor  # [T, k]
    y: Tensor  # [T * k, D], in sorted order
    routing: MoERouting
    order: Tensor  # [T * k] int64, sorted row -> slot: what argsort gives
    inverse: Tensor  # [T * k] int64
    token: Tensor  # [T * k] int64, sorted row -> token


def inputs(T, D, E, k, dtype, device):
    torch.manual_seed(0)
    ids = torch.rand(T, E, device=device).topk(k).indices.int()
    order = ids.flatten().long().argsort(stable=True)
    rows = [torch.randn(n, D, device=device).to(dtype).requires_grad_() for n in (T, T * k)]
    weights = torch.rand(T, k, device=device, requires_grad=True)
    routing = moe_sort(ids, E)
    return Inputs(E, ids, rows[0], weights, rows[1], routing, order, order.argsort(), order // k)


def call(function, leaves, given, direction):
    """A function without arguments that runs one row; gradients are of `leaves`, by name."""

    def forward():
        with torch.no_grad():
            return function(given)

    if direction == "forward":
        return forward
    grad = torch.randn_like(forward())
    of = [getattr(given, name) for name in leaves]
    return lambda: torch.autograd.grad(function(given), of, grad)


class Program:
    """One benchmark file run as a program. `rows_on(device)` are its functions by name."""

    def __init__(self, cases, directions=DIRECTIONS):
        self.cases, self.directions = cases, directions  # {title: (functions by name, leaves)}

    def main(self):
        parser = argparse.ArgumentParser()
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--tokens", default="1024,4096,16384")
        parser.add_argument("--dims", default="512")
        parser.add_argument("--experts", default="12x4", help="ExK,...")
        parser.add_argument("--dtypes", default="float32,bfloat16")
        parser.add_argument("--directions", default=",".join(self.directions))
        parser.add_argument("--seconds", type=float, default=20.0, help="per group of rows")
        given = parser.parse_args()
        torch.set_num_threads(given.threads)
        print(side_by_side.machine(given.device))
        for dtype in given.dtypes.split(","):
            for experts in given.experts.split(","):
                E, k = map(int, experts.split("x"))
                for D in map(int, given.dims.split(",")):
                    for T in map(int, given.tokens.split(",")):
                        self.tables((T, D, E, k, getattr(torch, dtype)), given)

    def tables(self, shape, given):
        made = inputs(*shape, given.device)
        for direction in given.directions.split(","):
            for title, (functions, leaves) in self.cases.items():
                torch.compiler.reset()  # else `compile` runs eagerly, from the ninth case on
                rows = {
                    name: call(function, leaves, made, direction)
                    for name, function in functions.items()
                }
                print("{}, T={} D={} E={} k={} {}".format(title, *shape), direction)
                results = side_by_side.compare(rows, OURS, given.device, given.seconds)
                for name, (milliseconds, ratio) in results.items():
                    print(f"  {name:16} {milliseconds:9.3f} ms {ratio:7.2f} x ours", flush=True)
