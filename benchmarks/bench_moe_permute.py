"""moe_permute against the gather of Hugging Face transformers. As a program: moe_dispatch.py"""

import pytest
import torch
from moe_dispatch import DIRECTIONS, OURS, SHAPES, Program, call, inputs

from m2ae_kernels import moe_permute


def eager(given):
    """Its backward sorts the indices again, to add up what belongs to one token."""
    return given.x[given.token]


def ours(given):
    return moe_permute(given.x, given.routing)[0]


ROWS = {"eager": eager, "compile": torch.compile(eager, dynamic=False), OURS: ours}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", ["eager", OURS])
@pytest.mark.parametrize("size", range(2))
def bench_moe_permute(size, impl, direction, device, bench):
    T, D, E, k, dtype = SHAPES[device][size]
    given = inputs(T, D, E, k, dtype, device)
    # A row of x is read once, and written k times.
    forward = dtype.itemsize * (T + T * k) * D
    bench(
        f"moe_permute {direction} T={T} D={D} E={E} k={k} {dtype}",
        call(ROWS[impl], ("x",), given, direction),
        bytes_moved=forward if direction == "forward" else 2 * forward,
        impl=impl,
    )


if __name__ == "__main__":
    Program({"moe_permute": (ROWS, ("x",))}).main()
