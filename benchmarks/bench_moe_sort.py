"""moe_sort against the argsorts of Hugging Face transformers. As a program: moe_dispatch.py"""

import pytest
import torch
from moe_dispatch import OURS, Program, call, inputs

from m2ae_kernels import moe_sort


def eager(given):
    """As its grouped experts have it: sort, invert the permutation by sorting it, count, sum."""
    ids = given.ids.flatten()
    order = ids.argsort(stable=True)
    inverse = order.argsort()
    count = torch.histc(ids.float(), bins=given.E, min=0, max=given.E - 1)
    return order, inverse, count.cumsum(0, dtype=torch.int32)


def eager_scatter(given):
    """The best form by hand: 16-bit keys, and the permutation inverted by a scatter."""
    ids = given.ids.flatten().short()
    order = ids.argsort(stable=True)
    slots = torch.arange(ids.numel(), device=ids.device)
    inverse = torch.empty_like(order).scatter_(0, order, slots)
    return order, inverse, torch.bincount(given.ids.flatten(), minlength=given.E).cumsum(0)


def ours(given):
    return moe_sort(given.ids, given.E)


ROWS = {
    "eager": eager,
    "eager_scatter": eager_scatter,
    "compile": torch.compile(eager, dynamic=False),
    OURS: ours,
}


@pytest.mark.parametrize("impl", ["eager", "eager_scatter", OURS])
@pytest.mark.parametrize("T,E,k", [(1024, 12, 4), (16384, 12, 4), (65536, 12, 4), (16384, 256, 8)])
def bench_moe_sort(T, E, k, impl, device, bench):
    given = inputs(T, 1, E, k, torch.float32, device)
    bench(
        f"moe_sort T={T} E={E} k={k}",
        call(ROWS[impl], (), given, "forward"),
        bytes_moved=12 * T * k,  # an id is read, and a place of either order written
        impl=impl,
    )


if __name__ == "__main__":
    Program({"moe_sort": (ROWS, ())}, directions=("forward",)).main()
