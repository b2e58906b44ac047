"""moe_permute: rows, their weights and gradients of every kernel. The table of traps and their
tests is in test_moe_sort.py.
"""

import pytest
import torch
from moe_cases import ROUTINGS, distinct_ids, routing_named, used_rows
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.testing import assert_close

from m2ae_kernels import moe_permute, moe_sort, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [0, 1, 16, 1000, 1031]


def rows_by_loops(x, routing, k):
    """Rows [N, D] from the definition, and the token of each of them, -1 where there is none."""
    tokens = [s // k % len(x) if s >= 0 else -1 for s in routing.sorted_ids.tolist()]
    zero = torch.zeros(1, x.shape[1], dtype=x.dtype, device=x.device)
    return torch.cat([x, zero])[tokens], tokens


def gradient_by_loops(grad_rows, tokens, T):
    """Sums per token, [T, D] in float64."""
    grad = torch.zeros(T, grad_rows.shape[1], dtype=torch.float64)
    for i, t in enumerate(tokens):
        if t >= 0:
            grad[t] += grad_rows[i].double().cpu()
    return grad


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("name", ROUTINGS)
def test_every_routing(name, align, impl):
    op, device = impl
    ids, E = routing_named(name)
    R, k = ids.shape
    routing = moe_sort(ids.to(device), E, align=align)
    x = torch.randn(R, 24, device=device, requires_grad=True)
    weights = torch.rand(R, k, device=device, requires_grad=True)
    rows, row_weights = op(x, routing, topk_weights=weights)
    expected, tokens = rows_by_loops(x.detach(), routing, k)
    assert torch.equal(rows, expected)
    used = used_rows(routing)
    slots = routing.sorted_ids[used].long()
    assert torch.equal(row_weights[used], weights.flatten()[slots])
    assert not row_weights[~used].any()
    grads = torch.randn_like(rows), torch.randn_like(row_weights)
    dx, dw = torch.autograd.grad((rows, row_weights), (x, weights), grads)
    assert_close(dx.cpu(), gradient_by_loops(grads[0], tokens, R).float())
    wanted = torch.zeros(R * k, device=device).scatter(0, slots, grads[1][used])
    assert torch.equal(dw, wanted.view(R, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_dtypes_and_widths(D, dtype, impl):
    op, device = impl
    ids = distinct_ids(33, 4, 12).to(device)
    routing = moe_sort(ids, 12, capacity=9, align=16)
    x = torch.randn(33, D, device=device).to(dtype).requires_grad_()
    rows, none = op(x, routing)
    assert none is None
    assert rows.dtype == dtype
    expected, tokens = rows_by_loops(x.detach(), routing, 4)
    assert torch.equal(rows, expected)
    grad = torch.randn_like(rows)
    (dx,) = torch.autograd.grad(rows, x, grad)
    # Sums of at most 4 in float32, rounded once: the default tolerances of the dtype.
    assert_close(dx.cpu(), gradient_by_loops(grad, tokens, 33).to(dtype))


def test_gradients_of_halves_are_summed_in_float32(impl):
    op, device = impl
    routing = moe_sort(torch.tensor([[0, 1, 2, 3]], device=device), 4)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.zeros(1, 3, dtype=dtype, device=device, requires_grad=True)
        rows, _ = op(x, routing)
        terms = [4096.0, 1.0, 1.0, -4096.0]  # of which 16 bits keep 0
        grad = torch.tensor(terms, device=device).to(dtype)[:, None].expand(4, 3)
        (dx,) = torch.autograd.grad(rows, x, grad)
        assert dx.tolist() == [[2.0] * 3]


@pytest.mark.parametrize("S", [2, 3])
def test_streams(S, impl):
    op, device = impl
    T, k, E = 19, 2, 5
    ids = distinct_ids(S * T, k, E).to(device)
    routing = moe_sort(ids, E, capacity=11, align=8)
    x = torch.randn(T, 40, device=device, requires_grad=True)
    rows, _ = op(x, routing)
    expected, tokens = rows_by_loops(x.detach(), routing, k)
    assert torch.equal(rows, expected)
    copied, _ = op(x.detach().repeat(S, 1), routing)  # row s * T + t
    assert torch.equal(rows, copied)
    grad = torch.randn_like(rows)
    (dx,) = torch.autograd.grad(rows, x, grad)
    assert_close(dx.cpu(), gradient_by_loops(grad, tokens, T).float())


def test_no_streams_at_all(impl):
    op, device = impl
    routing = moe_sort(torch.empty(0, 2, dtype=torch.int32, device=device), 3, align=8)
    x = torch.randn(4, 5, device=device, requires_grad=True)
    rows, _ = op(x, routing)
    assert rows.shape == (24, 5)
    assert not rows.any()
    rows.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("align", [8, 16, 64, 128])
def test_poison(align, impl):
    """Padding and the tail are written, and what comes back from them is never read."""
    op, device = impl
    ids = distinct_ids(21, 2, 6).to(device)
    ids[4] = -1
    routing = moe_sort(ids, 9, capacity=5, align=align)
    used = used_rows(routing)
    assert not used[-align:].any()
    x = torch.randn(21, 48, device=device)
    x[4] = torch.nan  # a row that is not routed
    x.requires_grad_()
    weights = torch.rand(21, 2, device=device)
    weights[routing.inverse_ids < 0] = torch.nan  # nor are these
    weights.requires_grad_()
    rows, row_weights = op(x, routing, topk_weights=weights)
    assert not rows[~used].any()
    assert not row_weights[~used].any()
    assert rows.isfinite().all()
    assert row_weights.isfinite().all()
    grad_rows = torch.randn_like(rows).masked_fill(~used[:, None], torch.nan)
    grad_row_weights = torch.randn_like(row_weights).masked_fill(~used, torch.nan)
    dx, dw = torch.autograd.grad((rows, row_weights), (x, weights), (grad_rows, grad_row_weights))
    assert dx.isfinite().all()
    assert not dx[4].any()
    assert dw.isfinite().all()
    assert not dw[routing.inverse_ids < 0].any()


def test_reused_memory_is_written():
    # Over a megabyte, which the CPU kernel takes from memory that earlier results have left.
    ids = distinct_ids(600, 2, 4)
    routing = moe_sort(ids, 6, capacity=200, align=64)
    for _ in range(2):
        rows, _ = moe_permute(torch.full((600, 520), torch.nan), routing)
        assert rows.nbytes > 2**20
        del rows
    x = torch.randn(600, 520, requires_grad=True)
    rows, _ = moe_permute(x, routing)
    assert torch.equal(rows, reference.moe_permute(x, routing)[0])
    other, _ = moe_permute(x + 1, routing)
    assert torch.equal(rows, reference.moe_permute(x, routing)[0])  # not given away while in use
    del other


@pytest.mark.parametrize("D", [1024, 1031])
def test_large_rows_past_the_caches(D):
    # Over a megabyte, from where on the CPU kernel writes around its caches; 1031 floats have rows
    # at addresses that this cannot be done to.
    ids = distinct_ids(300, 2, 4)
    routing = moe_sort(ids, 4, align=8)
    x = torch.randn(300, D, requires_grad=True)
    rows, _ = moe_permute(x, routing)
    assert rows.nbytes > 2**20
    expected, tokens = rows_by_loops(x.detach(), routing, 2)
    assert torch.equal(rows, expected)
    grad = torch.randn_like(rows)
    (dx,) = torch.autograd.grad(rows, x, grad)
    assert_close(dx, gradient_by_loops(grad, tokens, 300).float())


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_gradients_not_needed(needs, impl):
    op, device = impl
    routing = moe_sort(distinct_ids(9, 2, 4).to(device), 4)
    x = torch.randn(9, 6, device=device, requires_grad=needs[0])
    weights = torch.rand(9, 2, device=device, requires_grad=needs[1])
    rows, row_weights = op(x, routing, topk_weights=weights)
    if any(needs):
        (rows.sum() + row_weights.sum()).backward()
        assert [x.grad is not None, weights.grad is not None] == list(needs)
    x, weights = (tensor.detach().requires_grad_() for tensor in (x, weights))
    rows, row_weights = op(x, routing, topk_weights=weights)
    row_weights.sum().backward()  # no gradient comes from rows at all
    assert x.grad is None
    assert torch.equal(weights.grad, torch.ones_like(weights))


def test_saves_no_rows(impl):
    op, device = impl
    routing = moe_sort(distinct_ids(64, 2, 4).to(device), 4)
    x = torch.randn(64, 512, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op(x, routing)
    assert sum(tensor.nbytes for tensor in saved) <= 4 * 64 * 2


def test_strides_and_modes(impl):
    op, device = impl
    routing = moe_sort(distinct_ids(20, 2, 4).to(device), 4, align=8)
    wide = torch.randn(20, 60, device=device)
    weights = torch.rand(2, 20, device=device).t()
    for x in (wide[:, 5:21], wide[:, ::3], wide.t().contiguous().t(), wide[:1].expand(20, 60)):
        expected = op(x.clone().contiguous(), routing, topk_weights=weights.contiguous())
        assert all(map(torch.equal, op(x, routing, topk_weights=weights), expected))
        with torch.inference_mode():
            assert torch.equal(op(x, routing)[0], expected[0])
        with torch.autocast(device, torch.bfloat16):  # has no say
            assert all(map(torch.equal, op(x, routing, topk_weights=weights), expected))
    x = wide.detach().requires_grad_()
    rows, row_weights = op(x, routing, topk_weights=weights.requires_grad_())
    grads = torch.randn(1, 1, device=device), torch.randn(1, device=device)
    spread = [g.expand_as(y) for g, y in zip(grads, (rows, row_weights), strict=True)]
    given = torch.autograd.grad((rows, row_weights), (x, weights), spread, retain_graph=True)
    dense = [g.contiguous() for g in spread]
    assert all(
        map(torch.equal, given, torch.autograd.grad((rows, row_weights), (x, weights), dense))
    )


def test_half_weights_come_as_float32(impl):
    op, device = impl
    routing = moe_sort(distinct_ids(6, 2, 4).to(device), 4)
    weights = torch.rand(6, 2, device=device).bfloat16().requires_grad_()
    _, row_weights = op(torch.randn(6, 3, device=device), routing, topk_weights=weights)
    assert row_weights.dtype == torch.float32
    assert torch.equal(row_weights, weights.flatten().float()[routing.sorted_ids.long()])
    row_weights.sum().backward()
    assert weights.grad.dtype == torch.bfloat16


def test_repeats(impl):
    op, device = impl
    routing = moe_sort(distinct_ids(200, 4, 12).to(device), 12, capacity=50)
    x = torch.randn(200, 70, device=device, requires_grad=True)
    grad = torch.randn(800, 70, device=device)
    results = []
    for _ in range(5):
        rows, _ = op(x, routing)
        results.append((rows, *torch.autograd.grad(rows, x, grad)))
    assert all(all(map(torch.equal, result, results[0])) for result in results)


def test_threads():
    routing = moe_sort(distinct_ids(3001, 2, 12), 12, capacity=480, align=8)
    x = torch.randn(3001, 130, requires_grad=True)
    weights = torch.rand(3001, 2)
    grad = torch.randn(routing.sorted_ids.numel(), 130)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows, row_weights = moe_permute(x, routing, topk_weights=weights)
            results.append((rows, row_weights, *torch.autograd.grad(rows, x, grad)))
    finally:
        torch.set_num_threads(1)
    assert all(all(map(torch.equal, result, results[0])) for result in results)


def test_second_derivative_is_refused(impl):
    op, device = impl
    routing = moe_sort(distinct_ids(6, 2, 4).to(device), 4)
    x = torch.randn(6, 3, device=device, requires_grad=True)
    rows, _ = op(x, routing)
    (grad,) = torch.autograd.grad(rows.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"moe_permute: expected one backward, got a second"):
        grad.sum().backward()


def test_reference_gradients():
    ids = distinct_ids(10, 2, 4)
    ids[3] = -1
    for given in ({}, {"capacity": 3, "align": 8}):
        routing = moe_sort(ids, 4, **given)
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)  # two streams
        weights = torch.rand(10, 2, dtype=torch.float64, requires_grad=True)
        assert gradcheck(
            lambda x, w, routing=routing: reference.moe_permute(x, routing, topk_weights=w),
            (x, weights),
        )


def test_registration(impl):
    _, device = impl
    op = torch.ops.m2ae_kernels.moe_permute.default
    routing = moe_sort(distinct_ids(6, 2, 5).to(device), 5, align=4)
    ids = routing.sorted_ids, routing.inverse_ids
    x = torch.randn(3, 7, device=device, requires_grad=True)
    weights = torch.rand(6, 2, device=device, requires_grad=True)
    opcheck(op, (x, *ids, weights))
    opcheck(op, (x.detach().bfloat16().t().contiguous().t(), *ids, None))
    backward = torch.ops.m2ae_kernels.moe_permute_backward.default
    N = routing.sorted_ids.numel()
    grads = torch.randn(N, 7, device=device), torch.randn(N, device=device)
    for given, mask in [
        (grads, [True, True]),
        ((grads[0], None), [True, False]),
        ((None, grads[1]), [False, True]),
        (grads, [False, False]),
    ]:
        opcheck(backward, (*given, routing.inverse_ids, 3, 7, mask))


def test_compiles_to_one_graph(impl):
    op, device = impl

    def both(x, ids, weights):
        return op(x, moe_sort(ids, 5, align=4), topk_weights=weights)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (6, 11, 30):
        ids = distinct_ids(2 * T, 2, 5).to(device)
        x = torch.randn(T, 7, device=device, requires_grad=True)
        weights = torch.rand(2 * T, 2, device=device, requires_grad=True)
        expected, actual = both(x, ids, weights), compiled(x, ids, weights)
        assert all(map(torch.equal, actual, expected))
        loss = [rows.square().sum() + w.square().sum() for rows, w in (actual, expected)]
        grads = [torch.autograd.grad(value, (x, weights)) for value in loss]
        assert all(map(torch.equal, *grads))
