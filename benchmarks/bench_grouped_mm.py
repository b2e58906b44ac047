"""grouped_mm with bias and GELU against torch's grouped_mm and a loop, with both after them.

`python benchmarks/bench_grouped_mm.py [--threads 2] [--shapes 4096x512x2048x12] [--dtype float32]
[--seconds 20]` lets the rows take turns: M rows, K terms, C columns, E experts.
"""

import argparse

import pytest
import side_by_side
import torch
from moe_layers import PRODUCTS
from torch.nn import functional as F

from m2ae_kernels import grouped_mm

OURS = "m2ae_kernels"
DIRECTIONS = {"forward": 1, "forward+backward": 3}  # products of 2 M K C
# (M, K, C, E): a smoke run's, and the rows of 16,384 tokens in M3-JEPA's layer.
SHAPES = {"cpu": (2048, 256, 512, 12), "cuda": (65536, 2048, 2048, 12)}


def eager(a, b, offs, bias):
    begin, parts = 0, []
    for e, end in enumerate(offs.tolist()):
        parts.append(F.gelu(torch.addmm(bias[e], a[begin:end], b[e])))
        begin = end
    return torch.cat(parts)


def torch_grouped_mm(a, b, offs, bias):
    sizes = F.pad(offs, (1, 0)).diff()
    rows = bias.repeat_interleave(sizes, 0, output_size=len(a))
    return F.gelu(PRODUCTS[a.dtype == torch.bfloat16](a, b, offs) + rows)


def ours(a, b, offs, bias):
    return grouped_mm(a, b, offs=offs, bias=bias, activation="gelu")


IMPLS = {
    "eager loop": eager,
    "F.grouped_mm": torch_grouped_mm,
    "compile": torch.compile(torch_grouped_mm, dynamic=False),
    OURS: ours,
}


def call(impl, M, K, C, E, dtype, direction, device):
    """A function without arguments that runs one row."""
    torch.manual_seed(0)
    a, b, bias = (
        torch.randn(shape).to(device, dtype).requires_grad_()
        for shape in ((M, K), (E, K, C), (E, C))
    )
    offs = torch.linspace(0, M, E + 1, device=device).to(torch.int32)[1:]
    grad = torch.randn(M, C).to(device, dtype)

    def forward():
        return IMPLS[impl](a, b, offs, bias)

    def both():
        return torch.autograd.grad(forward(), (a, b, bias), grad)

    return forward if direction == "forward" else both


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "compile"])
def bench_grouped_mm(impl, direction, device, bench):
    M, K, C, E = SHAPES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bench(
        f"grouped_mm {direction} M={M} K={K} C={C} E={E}",
        call(impl, M, K, C, E, dtype, direction, device),
        flops=DIRECTIONS[direction] * 2 * M * K * C,
        impl=impl,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", default="4096x512x2048x12", help="MxKxCxE,...")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=20.0, help="per group of rows")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(side_by_side.machine(given.device))
    for shape in given.shapes.split(","):
        case = (*map(int, shape.split("x")), getattr(torch, given.dtype))
        for direction in DIRECTIONS:
            torch.compiler.reset()  # else `compile` runs eagerly, from the ninth case on
            calls = {impl: call(impl, *case, direction, given.device) for impl in IMPLS}
            print("M={} K={} C={} E={} {}".format(*case), direction)
            results = side_by_side.compare(calls, OURS, given.device, given.seconds)
            for impl, (milliseconds, ratio) in results.items():
                print(f"  {impl:14} {milliseconds:10.2f} ms {ratio:7.2f} x ours", flush=True)


if __name__ == "__main__":
    main()
