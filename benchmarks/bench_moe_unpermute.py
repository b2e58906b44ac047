"""moe_unpermute against multiplying and index_add_, and there and back again with moe_permute.

"Dispatch and combine" is what a layer pays beside its experts: sort, permute, unpermute, with
experts that do nothing. As a program: moe_dispatch.py
"""

import pytest
import torch
from moe_dispatch import DIRECTIONS, OURS, SHAPES, Program, call, inputs

from m2ae_kernels import moe_permute, moe_sort, moe_unpermute


def eager(given):
    """As Hugging Face transformers has it."""
    weighted = given.y * given.weights.flatten()[given.order, None]
    return torch.zeros_like(given.x).index_add_(0, given.token, weighted.to(given.x.dtype))


def eager_gather(given):
    """The best form by hand: back to the order of tokens, then a sum over k."""
    rows = given.y[given.inverse].view(*given.weights.shape, -1)
    return (rows * given.weights[..., None]).sum(1).to(given.x.dtype)


def ours(given):
    return moe_unpermute(given.y, given.routing, given.weights)


def dispatch(x, ids):
    order = ids.flatten().argsort(stable=True)
    token = order // ids.shape[1]
    return x[token], order, token


def combine(rows, x, weights, order, token):
    weighted = rows * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add_(0, token, weighted.to(x.dtype))


def there_and_back(dispatch, combine):
    """Two functions, which the compiler sees apart, as experts stand between them in a model."""

    def run(given):
        rows, *places = dispatch(given.x, given.ids)
        return combine(rows, given.x, given.weights, *places)

    return run


def eager_gather_both(given):
    k = given.weights.shape[1]
    order = given.ids.flatten().argsort(stable=True)
    slots = torch.arange(order.numel(), device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, slots)
    rows = given.x[order // k][inverse].view(*given.weights.shape, -1)
    return (rows * given.weights[..., None]).sum(1).to(given.x.dtype)


def ours_both(given):
    routing = moe_sort(given.ids, given.E)
    rows, _ = moe_permute(given.x, routing)
    return moe_unpermute(rows, routing, given.weights)


def compiled(function):
    return torch.compile(function, dynamic=False)


UNPERMUTE = {
    "eager": eager,
    "eager_gather": eager_gather,
    "compile": compiled(eager),
    OURS: ours,
}
BOTH = {
    "eager": there_and_back(dispatch, combine),
    "eager_gather": eager_gather_both,
    "compile": there_and_back(compiled(dispatch), compiled(combine)),
    OURS: ours_both,
}
CASES = {
    "moe_unpermute": (UNPERMUTE, ("y", "weights")),
    "dispatch and combine": (BOTH, ("x", "weights")),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", ["eager", "eager_gather", OURS])
@pytest.mark.parametrize("size", range(2))
@pytest.mark.parametrize("case", CASES)
def bench_moe_unpermute(case, size, impl, direction, device, bench):
    T, D, E, k, dtype = SHAPES[device][size]
    functions, leaves = CASES[case]
    given = inputs(T, D, E, k, dtype, device)
    # k rows of y are read, and one is written; backward the other way, and y for the weights.
    rows = {"forward": k + 1, "both": 3 * k + 2}[direction]
    moved = rows * T * D * dtype.itemsize if case == "moe_unpermute" else None
    bench(
        f"{case} {direction} T={T} D={D} E={E} k={k} {dtype}",
        call(functions[impl], leaves, given, direction),
        bytes_moved=moved,
        impl=impl,
    )


if __name__ == "__main__":
    Program(CASES).main()
