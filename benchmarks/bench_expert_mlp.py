"""expert_mlp against the layers that users write: benchmarks/moe_layers.py.

`python benchmarks/bench_expert_mlp.py [--device cuda] [--threads N] [--layer D H E k]` lets the
rivals take turns, forward and backward, which is what a ratio on a shared machine needs, and adds
the peak memory of one call, without the gradients that it returns.
"""

import argparse

import moe_layers
import pytest
import side_by_side
import torch

from m2ae_kernels import expert_mlp

LAYER = (512, 2048, 12, 4)  # D, H, E, k
RIVALS = {
    "eager loop": moe_layers.loop,
    "grouped_mm": moe_layers.torch_grouped_mm,
    "compile": torch.compile(moe_layers.torch_grouped_mm, dynamic=False),
    "all experts": moe_layers.all_experts,
}
# (T, D, H, E, k): small enough for a smoke run, and a part of M3-JEPA's batch.
SHAPES = {"cpu": (512, 256, 512, 12, 4), "cuda": (16384, 2048, 2048, 12, 4)}
IMPLS = ("m2ae_kernels", *RIVALS)


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
        return RIVALS[impl](x, w1, w2, weights, b1, b2, routing)

    def both():
        return torch.autograd.grad(forward(), leaves, grad)

    return forward if direction == "forward" else both


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "compile"])
def bench_expert_mlp(impl, direction, device, bench):
    T, D, H, E, k = SHAPES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    fn = call_of(impl, T, D, H, E, k, dtype, device, direction)
    passes = 1 if direction == "forward" else 3
    group = f"expert_mlp {direction} T={T} D={D} H={H} E={E} k={k}"
    bench(group, fn, flops=passes * 4 * T * k * D * H, impl=impl)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--layer", type=int, nargs=4, default=LAYER, metavar=("D", "H", "E", "K"))
    parser.add_argument("--impls", nargs="+", default=list(IMPLS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--directions", nargs="+", default=["forward", "both"])
    parser.add_argument(
        "--peak", metavar="IMPL", help="print the peak memory of a call, without gradients"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    if given.peak:
        case = (dtype, given.device, "both")
        call_of(given.peak, 64, 64, 64, 2, 1, *case)()  # what is loaded once
        call = call_of(given.peak, given.tokens[0], *given.layer, *case)
        if given.peak == "compile":
            call()  # what compiling takes is not the layer's
        grads = []
        peak = side_by_side.peak_mb(lambda: grads.extend(call()), given.device)
        print(peak - sum(grad.nbytes for grad in grads) / 1e6)
        return
    print(side_by_side.machine(given.device))
    for T in given.tokens:
        for direction in given.directions:
            torch.compiler.reset()  # else `compile` runs eagerly, from the ninth case on
            case = (T, *given.layer, dtype, given.device, direction)
            calls = {impl: call_of(impl, *case) for impl in given.impls}
            print(f"T = {T}, D, H, E, k = {given.layer}, {given.dtype}, {direction}")
            table = side_by_side.compare(calls, "m2ae_kernels", given.device, given.seconds)
            for impl, (ms, ratio) in table.items():
                flags = ("--threads", given.threads, "--dtype", given.dtype, "--tokens", T)
                flags += ("--device", given.device, "--layer", *given.layer)
                line = f"  {impl:14} {ms:8.1f} ms  {ratio:5.2f}x ours"
                if direction == "both":
                    peak = side_by_side.in_fresh_process(__file__, *flags, "--peak", impl)
                    line += f"  {peak:6.0f} MB"
                print(line)


if __name__ == "__main__":
    main()
