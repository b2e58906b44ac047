"""What the benchmarks of the contrastive losses share: shapes, calls, and the program they are.

python benchmarks/bench_<loss>.py [--device cuda] [--threads 2] [--shapes 1024x256,4096x512]
    [--dtypes float32,bfloat16] [--directions both] [--seconds 20] [--no-memory]

prints a table of rows that took turns: milliseconds, how many times ours, and the peak memory of
one call. On Linux CPUs run it also with GLIBC_TUNABLES=glibc.malloc.mmap_threshold=17179869184:\
glibc.malloc.trim_threshold=17179869184, which lets eager PyTorch keep its temporaries.
"""

import argparse
import inspect

import side_by_side
import torch

SHAPES = {"cpu": (1024, 4096, 16384), "cuda": (4096, 16384, 65536)}
DIMS = (256, 512, 1024)
DIRECTIONS = {"forward": 1, "backward": 2, "both": 3}  # products of 2 N N D, if logits are kept
OURS = "m2ae_kernels"


def call(function, numbers, N, D, dtype, direction, device):
    """A function without arguments that runs one row; `numbers` are scale, and bias."""
    torch.manual_seed(0)
    inputs = [torch.randn(N, D, device=device).to(dtype).requires_grad_() for _ in range(2)]
    inputs += [torch.tensor(x, device=device, requires_grad=True) for x in numbers]

    def forward():
        with torch.no_grad():
            return function(*inputs)

    def no_gradients():
        for tensor in inputs:
            tensor.grad = None

    def both():
        no_gradients()
        function(*inputs).backward()

    if direction != "backward":
        return {"forward": forward, "both": both}[direction]
    loss = function(*inputs)

    def backward():
        no_gradients()
        loss.backward(retain_graph=True)

    return backward


class Program:
    """One benchmark file run as a program. `rows_on(device)` are its functions by name."""

    def __init__(self, rows_on, numbers):
        self.rows_on, self.numbers = rows_on, numbers
        self.script = inspect.getfile(rows_on)

    def call(self, function, *case):
        N, D, dtype, direction, device = case
        shape = (int(N), int(D), getattr(torch, dtype))
        return call(function, self.numbers, *shape, direction, device)

    def table(self, cases, seconds, memory):
        device = cases[0][-1]
        print(side_by_side.machine(device))
        for case in cases:
            torch.compiler.reset()  # else `compile` runs eagerly, from the ninth case on
            rows = {name: self.call(row, *case) for name, row in self.rows_on(device).items()}
            results = side_by_side.compare(rows, OURS, device, seconds)
            print("N={} D={} {} {}".format(*case))
            for name, (milliseconds, ratio) in results.items():
                line = f"  {name:20} {milliseconds:10.2f} ms {ratio:7.2f} x ours"
                if memory:
                    arguments = ("--threads", torch.get_num_threads(), "--peak-of", name, *case)
                    peak = side_by_side.in_fresh_process(self.script, *arguments)
                    line += f" {peak:10.1f} MB peak"
                print(line, flush=True)

    def peak_of(self, name, *case):
        function = self.rows_on(case[-1])[name]
        # Whatever the first call of all loads, and what compiling takes, is not of the shape's.
        self.call(function, 64, *case[1:])()
        measured = self.call(function, *case)
        if name == "compile":
            measured()
        print(side_by_side.peak_mb(measured, case[-1]))

    def main(self):
        parser = argparse.ArgumentParser()
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--shapes", help="NxD,...")
        parser.add_argument("--dtypes", default="float32,bfloat16")
        parser.add_argument("--directions", default=",".join(DIRECTIONS))
        parser.add_argument("--seconds", type=float, default=20.0, help="per group of rows")
        parser.add_argument("--no-memory", action="store_true")
        parser.add_argument("--peak-of", nargs=6, help=argparse.SUPPRESS)
        given = parser.parse_args()
        torch.set_num_threads(given.threads)
        if given.peak_of:
            self.peak_of(*given.peak_of)
            return
        shapes = [(N, D) for N in SHAPES[given.device] for D in DIMS]
        if given.shapes:
            shapes = [tuple(shape.split("x")) for shape in given.shapes.split(",")]
        cases = [
            (N, D, dtype, direction, given.device)
            for N, D in shapes
            for dtype in given.dtypes.split(",")
            for direction in given.directions.split(",")
        ]
        self.table(cases, given.seconds, not given.no_memory)
