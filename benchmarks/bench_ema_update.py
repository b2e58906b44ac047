"""ema_update_ on the 150 tensors of a ViT-B against what PyTorch users write."""

import functools

import pytest
import side_by_side
import torch

from m2ae_kernels import ema_update_

DECAY = 0.996


def vit_b_shapes():
    """Shapes of ViT-B/16's 150 parameters, 85.8 M numbers."""
    D, block = 768, []
    block += [(D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,)]  # norm, qkv, projection
    block += [(D,), (D,), (4 * D, D), (4 * D,), (D, 4 * D), (D,)]  # norm, MLP
    return [(D, 3, 16, 16), (D,), (1, 1, D), (1, 197, D), *(block * 12), (D,), (D,)]


def parameters(dtype, device, shapes):
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def lerp(targets, sources, shadows):
    torch._foreach_lerp_(targets, sources, 1 - DECAY)


def cast_lerp(targets, sources, shadows):
    torch._foreach_lerp_(targets, [source.float() for source in sources], 1 - DECAY)


def cast_lerp_copy(targets, sources, shadows):
    cast_lerp(targets, sources, shadows)
    torch._foreach_copy_(shadows, targets)


def mul_add(targets, sources, shadows):
    for target, source in zip(targets, sources, strict=True):
        target.mul_(DECAY).add_(source, alpha=1 - DECAY)


def ours(targets, sources, shadows):
    ema_update_(targets, sources, DECAY, shadows=shadows)


EQUAL, MIXED, SHADOWED = "float32", "bfloat16 to float32", "bfloat16 to float32 + shadow"
EAGER = {EQUAL: lerp, MIXED: cast_lerp, SHADOWED: cast_lerp_copy}
BYTES = {EQUAL: 12, MIXED: 10, SHADOWED: 12}  # per element, each read and written once


@pytest.mark.parametrize("impl", ["eager", "eager loop", "m2ae_kernels"])
@pytest.mark.parametrize("case", EAGER)
def bench_ema_update(case, impl, device, bench):
    shapes = vit_b_shapes()
    targets = parameters(torch.float32, device, shapes)
    source_dtype = torch.float32 if case == EQUAL else torch.bfloat16
    sources = parameters(source_dtype, device, shapes)
    shadows = None
    if case == SHADOWED:
        shadows = [torch.empty_like(t, dtype=torch.bfloat16) for t in targets]
    function = {"eager": EAGER[case], "eager loop": mul_add, "m2ae_kernels": ours}[impl]
    if impl == "eager loop" and case == SHADOWED:
        pytest.skip("the loop writes no shadow")
    numel = sum(t.numel() for t in targets)
    bench(
        f"ema_update_ {case}, ViT-B",
        lambda: function(targets, sources, shadows),
        bytes_moved=BYTES[case] * numel,
        impl=impl,
    )


@pytest.mark.parametrize("impl", ["eager", "m2ae_kernels"])
def bench_small_tensors(impl, device, bench):
    shapes = [(1000,)] * 150
    targets = parameters(torch.float32, device, shapes)
    sources = parameters(torch.float32, device, shapes)
    function = {"eager": lerp, "m2ae_kernels": ours}[impl]
    bench("ema_update_ 150 x 1000", lambda: function(targets, sources, None), impl=impl)


@pytest.mark.parametrize("impl", ["torch.add", "m2ae_kernels"])
def bench_call(impl, device, bench):
    """What a call costs before any work: 8 elements, 1000 calls per round."""
    target, source = torch.zeros(8, device=device), torch.ones(8, device=device)
    targets, sources = [target], [source]

    def add():
        for _ in range(1000):
            torch.add(target, source)

    def call():
        for _ in range(1000):
            ema_update_(targets, sources, DECAY)

    name = "1000 calls on 8 elements"
    bench(name, {"torch.add": add, "m2ae_kernels": call}[impl], impl=impl)


def table():
    """Rows that take turns; their ratios are what README states."""
    torch.set_num_threads(1)
    print(side_by_side.machine("cpu"))
    targets = parameters(torch.float32, "cpu", vit_b_shapes())
    shadows = [torch.zeros_like(t, dtype=torch.bfloat16) for t in targets]
    for case, eager in EAGER.items():
        source_dtype = torch.float32 if case == EQUAL else torch.bfloat16
        sources = parameters(source_dtype, "cpu", vit_b_shapes())
        given = shadows if case == SHADOWED else None
        rows = {
            function.__name__: functools.partial(function, targets, sources, given)
            for function in (eager, mul_add, ours)
        }
        print(case)
        for name, (milliseconds, ratio) in side_by_side.compare(rows, "ours", seconds=3).items():
            print(f"  {name:16} {milliseconds:7.1f} ms  {ratio:5.2f} x ours")


if __name__ == "__main__":
    table()
