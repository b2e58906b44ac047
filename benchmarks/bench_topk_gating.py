"""topk_gating against softmax, topk, sums and counts in eager PyTorch, and compiled.

python benchmarks/bench_topk_gating.py [--device cuda] [--threads 2] [--experts 12x4,64x8]
    [--tokens 1024,16384] [--dtypes float32] [--directions both] [--seconds 10]

prints a table of rows that took turns: microseconds of a call, nanoseconds of a token, how many
times ours. `both` is forward and backward. On Linux CPUs run it also with the GLIBC_TUNABLES that
contrastive.py names: rows take turns, and what eager PyTorch gives back to the system, ours has to
fetch again.
"""

import argparse
import statistics

import pytest
import side_by_side
import torch

from m2ae_kernels import topk_gating

EXPERTS = ((8, 2), (12, 4), (64, 8), (256, 8))  # (E, k); the first two are those of M3-JEPA
TOKENS = (1024, 16384, 65536)
DIRECTIONS = ("forward", "both")
# (T, E, k) on a GPU: of a thread each, of a warp each, and of a warp each in many turns
GPU_SHAPES = ((65536, 12, 4), (8192, 256, 8), (262144, 256, 8))
OURS = "m2ae_kernels"


def eager(logits, k):
    """Weights that sum to 1, ids, and what the balance and z losses need."""
    probs = logits.float().softmax(-1)
    weights, ids = probs.topk(k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    count = torch.bincount(ids.flatten(), minlength=logits.shape[1])
    return weights, ids, logits.float().logsumexp(-1), probs.sum(0), count


def eager_without_bincount(logits, k):
    """The same in operations that compile to one graph: bincount's size depends on its data."""
    probs = logits.float().softmax(-1)
    weights, ids = probs.topk(k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    count = torch.zeros_like(probs, dtype=torch.int32).scatter(1, ids, 1).sum(0)
    return weights, ids, logits.float().logsumexp(-1), probs.sum(0), count


def ours(logits, k):
    output = topk_gating(logits, k, norm_topk_prob=True, return_probs_sum=True)
    return (
        output.topk_weights,
        output.topk_ids,
        output.logsumexp,
        output.probs_sum,
        output.tokens_per_expert,
    )


def rows_on_any_device():
    compiled = torch.compile(eager_without_bincount, dynamic=False)
    return {"eager": eager, "compile": compiled, OURS: ours}


def call(function, T, E, k, dtype, direction, device):
    """A function without arguments that runs one row."""
    torch.manual_seed(0)
    logits = torch.randn(T, E, device=device).to(dtype).requires_grad_()
    grads = [torch.randn(shape, device=device) for shape in ((T, k), (T,), (E,))]

    def forward():
        with torch.no_grad():
            return function(logits, k)

    def both():
        logits.grad = None
        weights, _, logsumexp, probs_sum, _ = function(logits, k)
        torch.autograd.backward([weights, logsumexp, probs_sum], grads)

    def backward_of(outputs):
        weights, _, logsumexp, probs_sum, _ = outputs
        differentiated = [weights, logsumexp, probs_sum]

        def backward():
            return torch.autograd.grad(differentiated, logits, grads, retain_graph=True)

        return backward

    if direction == "backward":
        return backward_of(function(logits, k))
    return {"forward": forward, "both": both}[direction]


def bytes_of(T, E, k, size):
    """Moved at least, by forward and by backward."""
    return size * T * E + 8 * T * k + 4 * T, 2 * size * T * E + 8 * T * k + 4 * T


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", ["eager", OURS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("E,k", EXPERTS)
def bench_topk_gating(E, k, dtype, impl, direction, device, bench):
    """One number of tokens; the table over all is what this file prints as a program."""
    T = 1024
    forth, back = bytes_of(T, E, k, dtype.itemsize)
    bench(
        f"topk_gating {direction} T={T} E={E} k={k} {dtype}",
        call(rows_on_any_device()[impl], T, E, k, dtype, direction, device),
        bytes_moved=forth if direction == "forward" else forth + back,
        impl=impl,
    )


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("impl", ["eager", OURS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T,E,k", GPU_SHAPES)
def bench_topk_gating_on_a_gpu(T, E, k, dtype, impl, direction, device, bench):
    """What a GPU is busy with; of the CPU the table has the times."""
    if device == "cpu":
        pytest.skip("for GPUs")
    forth, back = bytes_of(T, E, k, dtype.itemsize)
    bench(
        f"topk_gating {direction} T={T} E={E} k={k} {dtype}",
        call(rows_on_any_device()[impl], T, E, k, dtype, direction, device),
        bytes_moved=forth if direction == "forward" else back,
        impl=impl,
    )


def test_rows_agree():
    """What is timed is the same thing."""
    logits = torch.randn(50, 12)
    expected = eager(logits, 4)
    for row in (eager_without_bincount, ours):
        for x, y in zip(row(logits, 4), expected, strict=True):
            torch.testing.assert_close(x, y, check_dtype=False)


def table(cases, seconds):
    print(side_by_side.machine(cases[0][-1]))
    ratios = {direction: [] for direction in DIRECTIONS}
    for T, E, k, dtype, direction, device in cases:
        torch.compiler.reset()  # else `compile` runs eagerly, from the ninth case on
        case = (T, E, k, getattr(torch, dtype), direction, device)
        rows = {name: call(row, *case) for name, row in rows_on_any_device().items()}
        results = side_by_side.compare(rows, OURS, device, seconds)
        print(f"T={T} E={E} k={k} {dtype} {direction}")
        for name, (milliseconds, ratio) in results.items():
            each = f"{milliseconds * 1e3:10.1f} us {milliseconds * 1e6 / T:8.1f} ns a token"
            print(f"  {name:14} {each} {ratio:7.2f} x ours", flush=True)
        ratios[direction].append(results["eager"][1])
    for direction, of_cases in ratios.items():
        if of_cases:
            print(f"{direction}: eager takes {statistics.median(of_cases):.1f} x ours, median")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--experts", default=",".join(f"{E}x{k}" for E, k in EXPERTS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    parser.add_argument("--seconds", type=float, default=10.0, help="per group of rows")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cases = [
        (int(T), *map(int, experts.split("x")), dtype, direction, given.device)
        for experts in given.experts.split(",")
        for T in given.tokens.split(",")
        for dtype in given.dtypes.split(",")
        for direction in given.directions.split(",")
    ]
    table(cases, given.seconds)


if __name__ == "__main__":
    main()
