"""A whole mixture-of-experts layer against what users write, and against the peers' packages.

python benchmarks/bench_moe_layer.py [--device cuda] [--threads 2] [--tokens 1024,4096]
    [--layers gelu,swiglu] [--streams 1,2] [--dims 512x2048] [--experts 12x4] [--dtypes float32]
    [--directions forward,both] [--rows "eager loop,grouped_mm"] [--seconds 20] [--no-memory]

prints a table of rows that took turns: milliseconds, how many times ours, and the peak memory of a
call, without the gradients that it returns, in a process of its own. The rows: moe_whole.py. On
Linux CPUs run it also with the GLIBC_TUNABLES that contrastive.py names.
"""

import argparse
import itertools

import pytest
import side_by_side
import torch
from moe_whole import ACTIVATIONS, OURS, layer_of, rows_on

DIRECTIONS = ("forward", "both")
NAMES = (
    "all experts", "eager loop", "grouped_mm", "transformers", "liger_kernel", "scattermoe", OURS,
)  # fmt: skip
# (S, T, D, H, E, k) and dtype: a part of M3-JEPA's batch, and Qwen3's experts on a GPU.
SHAPES = {
    "cpu": {"gelu": (2, 128, 128, 256, 12, 4), "swiglu": (1, 256, 128, 256, 12, 4)},
    "cuda": {"gelu": (2, 8192, 2048, 2048, 12, 4), "swiglu": (1, 8192, 2048, 768, 128, 8)},
}


def call(row, activation, S, T, D, H, E, k, dtype, direction, device):
    """A function without arguments that runs one row."""
    function, fit = row
    layer = fit(layer_of(activation, S, T, D, H, E, k, dtype, device))
    leaves = layer.leaves()
    grad = torch.randn(S * T, D, device=device).to(dtype)

    def forward():
        with torch.no_grad():
            return function(layer)

    def both():
        return torch.autograd.grad(function(layer), leaves, grad)

    return {"forward": forward, "both": both}[direction]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def bench_moe_layer(activation, impl, direction, device, bench):
    S, T, D, H, E, k = shape = SHAPES[device][activation]
    row = rows_on(device, activation, S).get(impl)
    if row is None:
        pytest.skip(f"{impl} is not installed, or has no such layer, or does not run on {device}")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    matrices = 3 if activation == "swiglu" else 2
    bench(
        f"moe_layer {activation} {direction} S={S} T={T} D={D} H={H} E={E} k={k}",
        call(row, activation, *shape, dtype, direction, device),
        flops=(1 if direction == "forward" else 3) * 2 * matrices * S * T * k * D * H,
        impl=impl,
    )


@pytest.mark.parametrize("S", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_agree(activation, S):
    """What is timed is the same thing, forward and back."""
    results = {}
    for name, (function, fit) in rows_on("cpu", activation, S).items():
        if name == "compile":  # takes a quarter of a minute, and is another row's function
            continue
        layer = fit(layer_of(activation, S, 30, 16, 24, 5, 2, torch.float32, "cpu"))
        leaves = layer.leaves()[:S]  # x, and shift if there are two streams
        out = function(layer)
        results[name] = (out, *torch.autograd.grad(out.square().sum(), leaves))
    for name, result in results.items():
        # Sums of up to 48 terms in other orders: some 1e-6 of the largest, which are about 30.
        torch.testing.assert_close(result, results["all experts"], rtol=1e-5, atol=1e-4, msg=name)


def cases_of(given):
    lists = (given.layers, given.streams, given.tokens, given.dims, given.experts, given.dtypes)
    for activation, S, T, dims, experts, dtype in itertools.product(
        *(text.split(",") for text in lists)
    ):
        D, H = dims.split("x")
        E, k = experts.split("x")
        yield activation, *map(int, (S, T, D, H, E, k)), getattr(torch, dtype)


def table(case, direction, given):
    torch.compiler.reset()  # else `compile` runs eagerly, from the ninth case on
    rows = rows_on(given.device, case[0], case[1])
    names = given.rows.split(",") if given.rows else list(rows)
    calls = {
        name: call(rows[name], *case, direction, given.device) for name in {*names, OURS} & {*rows}
    }
    print("{}, S={} T={} D={} H={} E={} k={} {}".format(*case), direction)
    results = side_by_side.compare(calls, OURS, given.device, given.seconds)
    activation, S, T, D, H, E, k, dtype = case
    for name in [name for name in rows if name in results]:
        milliseconds, ratio = results[name]
        line = f"  {name:14} {milliseconds:10.2f} ms {ratio:7.2f} x ours"
        if direction == "both" and not given.no_memory:
            peak = side_by_side.in_fresh_process(
                __file__, "--device", given.device, "--threads", given.threads, "--peak-of", name,
                "--layers", activation, "--streams", S, "--tokens", T, "--dims", f"{D}x{H}",
                "--experts", f"{E}x{k}", "--dtypes", str(dtype).removeprefix("torch."),
            )  # fmt: skip
            line += f" {peak:8.0f} MB peak"
        print(line, flush=True)


def peak_of(name, case, device):
    """Print how far a call raises the memory in use, without the gradients that it returns."""
    row = rows_on(device, case[0], case[1])[name]
    call(row, *case[:2], 16, 16, 16, 2, 1, case[-1], "both", device)()  # what is loaded once
    measured = call(row, *case, "both", device)
    if name == "compile":
        measured()
    grads = []
    peak = side_by_side.peak_mb(lambda: grads.extend(measured()), device)
    print(peak - sum(grad.nbytes for grad in grads) / 1e6)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", default="gelu")
    parser.add_argument("--streams", default="1")
    parser.add_argument("--tokens", default="1024,4096")
    parser.add_argument("--dims", default="512x2048", help="DxH,...")
    parser.add_argument("--experts", default="12x4", help="Exk,...")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--directions", default="both")
    parser.add_argument("--rows", help="names of some rows; ours is always among them")
    parser.add_argument("--seconds", type=float, default=20.0, help="per group of rows")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak_of:
        peak_of(given.peak_of, next(cases_of(given)), given.device)
        return
    print(side_by_side.machine(given.device))
    for case in cases_of(given):
        for direction in given.directions.split(","):
            table(case, direction, given)


if __name__ == "__main__":
    main()
