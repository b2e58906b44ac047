"""moe_sort, moe_permute and moe_unpermute on a GPU: no waits, graphs, streams, many rows."""

import pytest
import torch
from gpu_streams import captured, own_stream
from torch.testing import assert_close

from m2ae_kernels import moe_permute, moe_sort, moe_unpermute, reference

pytestmark = pytest.mark.gpu
T, E, k, D = 3000, 12, 4, 64


def inputs(T=T, dtype=torch.float32):
    ids = torch.rand(T, E, device="cuda").argsort(1)[:, :k].int()
    weights = torch.rand(T, k, device="cuda").requires_grad_()
    return ids, weights, torch.randn(T, D, device="cuda").to(dtype).requires_grad_()


def step(ids, weights, x, **given):
    routing = moe_sort(ids, E, topk_weights=weights.detach(), **given)
    rows, row_weights = moe_permute(x, routing, topk_weights=weights)
    out = moe_unpermute(rows * row_weights[:, None].to(rows.dtype), routing, weights, residual=x)
    return *routing, out, *torch.autograd.grad(out.square().sum(), (x, weights))


OPTIONS = [
    {},
    {"capacity": 700, "align": 64},
    {"capacity": 700, "drop_policy": "slot"},
    {"capacity": 700, "drop_policy": "prob"},
]


@pytest.mark.parametrize("given", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_sync(dtype, given, no_sync):
    tensors = inputs(dtype=dtype)
    step(*tensors, **given)
    no_sync()
    step(*tensors, **given)


@pytest.mark.parametrize("given", OPTIONS[:3], ids=str)
def test_forward_and_backward_in_one_graph(given):
    ids, weights, x = inputs()
    graph, outputs = captured(lambda: step(ids, weights, x, **given))
    for _ in range(3):  # another routing at each replay
        with torch.no_grad():
            for tensor, value in zip((ids, weights, x), inputs(), strict=True):
                tensor.copy_(value)
        graph.replay()
        replayed = [t.clone() for t in outputs]
        assert all(map(torch.equal, replayed, step(ids, weights, x, **given)))


@pytest.mark.parametrize("given", OPTIONS, ids=str)
def test_sorts_as_the_cpu_does(given):
    for rows in (0, 1, 2047, 2049, 70_000):
        ids, weights, _ = inputs(rows)
        here = moe_sort(ids, E, topk_weights=weights.detach(), **given)
        there = moe_sort(ids.cpu(), E, topk_weights=weights.detach().cpu(), **given)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(here, there, strict=True))


def test_another_stream():
    ids, weights, x = inputs()
    expected = step(ids, weights, x)
    with own_stream(busy=True):
        copies = [t.detach().clone() for t in (ids, weights, x)]  # not there before
        result = step(copies[0], *(t.requires_grad_() for t in copies[1:]))
    assert all(map(torch.equal, result, expected))


def test_ids_out_of_range_are_skipped():
    ids, *_ = inputs(5)
    ids[1, 2], ids[3, 0] = E, -7
    routing = moe_sort(ids, E)
    ids[1, 2] = ids[3, 0] = -1
    assert all(map(torch.equal, routing, moe_sort(ids, E)))
    assert routing.tokens_per_expert.sum() == 5 * k - 2


def test_more_numbers_than_2_to_the_31():
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    T, D = 600_000, 1024  # T k D of 2.4e9
    ids, weights, _ = inputs(T)
    routing = moe_sort(ids, E)
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    rows, _ = moe_permute(x, routing)
    out = moe_unpermute(rows, routing, weights.detach())
    last = slice(T - 100, T)
    expected = x[last].float() * weights.detach()[last].sum(1, keepdim=True)
    assert_close(out[last], expected.bfloat16(), rtol=2**-7, atol=0)  # two roundings to bfloat16
    few = moe_sort(ids[:7], E)
    assert all(map(torch.equal, few, reference.moe_sort(ids[:7], E)))
