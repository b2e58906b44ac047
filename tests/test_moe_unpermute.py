"""moe_unpermute: values and gradients of every kernel, against loops in float64. The table of traps
and their tests is in test_moe_sort.py.
"""

import pytest
import torch
from moe_cases import ROUTINGS, distinct_ids, routing_named, sum_by_loops, used_rows
from torch.testing import assert_close

from m2ae_kernels import moe_permute, moe_sort, moe_unpermute

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [0, 1, 16, 1000, 1031]


def gradients_by_loops(grad, y, routing, weights):
    """Of y and of the weights, in float64, on the CPU."""
    grad, y = grad.double().cpu(), y.double().cpu()
    grad_y = torch.zeros_like(y)
    grad_weights = torch.zeros(routing.inverse_ids.shape, dtype=torch.float64)
    for r, places in enumerate(routing.inverse_ids.tolist()):
        for j, i in enumerate(places):
            if i >= 0:
                grad_y[i] = grad[r] * (1.0 if weights is None else weights[r, j].double().cpu())
                grad_weights[r, j] = grad[r] @ y[i]
    return grad_y, grad_weights


def case(R, k, E, D, device="cpu", dtype=torch.float32, **given):
    """Routing, y, weights, residual; gradients are wanted of all."""
    routing = moe_sort(distinct_ids(R, k, E).to(device), E, **given)
    y = torch.randn(routing.sorted_ids.numel(), D, device=device).to(dtype).requires_grad_()
    weights = torch.rand(R, k, device=device, requires_grad=True)
    residual = torch.randn(R, D, device=device).to(dtype).requires_grad_()
    return routing, y, weights, residual


def detached(*tensors):
    return [tensor.detach() for tensor in tensors]


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("name", ROUTINGS)
def test_every_routing(name, align, impl):
    op, device = impl
    ids, E = routing_named(name)
    routing = moe_sort(ids.to(device), E, align=align)
    y = torch.randn(routing.sorted_ids.numel(), 24, device=device, requires_grad=True)
    weights = torch.rand(ids.shape, device=device, requires_grad=True)
    residual = torch.randn(len(ids), 24, device=device, requires_grad=True)
    for w, more in [(weights, residual), (weights, None), (None, residual), (None, None)]:
        out = op(y, routing, w, residual=more)
        expected = sum_by_loops(y.cpu(), routing, None if w is None else w.cpu(), None)
        if more is not None:
            expected = expected + more.double().cpu()
        assert_close(out.cpu(), expected.float())
        grad = torch.randn_like(out)
        inputs = [tensor for tensor in (y, w, more) if tensor is not None]
        grads = dict(zip(map(id, inputs), torch.autograd.grad(out, inputs, grad), strict=True))
        grad_y, grad_weights = gradients_by_loops(grad, y.detach(), routing, w)
        assert_close(grads[id(y)].cpu(), grad_y.float())
        if w is not None:
            assert_close(grads[id(w)].cpu(), grad_weights.float())
        if more is not None:
            assert torch.equal(grads[id(more)], grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_dtypes_and_widths(D, dtype, impl):
    op, device = impl
    routing, y, weights, residual = case(33, 5, 12, D, device, dtype, capacity=9, align=16)
    out = op(y, routing, weights, residual=residual)
    assert out.dtype == dtype
    expected = sum_by_loops(*detached(y.cpu()), routing, *detached(weights.cpu(), residual.cpu()))
    # One rounding of a float32 sum: the default tolerances of the dtype.
    assert_close(out.cpu(), expected.to(dtype))
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, (y, weights, residual), grad)
    grad_y, grad_weights = gradients_by_loops(grad, y.detach(), routing, weights.detach())
    assert_close(actual[0].cpu(), grad_y.to(dtype))
    # Of 1031 products of either sign: a few units of float32 at the size of their sum of squares.
    assert_close(actual[1].cpu(), grad_weights.float(), rtol=2e-6, atol=2e-5)
    assert torch.equal(actual[2], grad)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 16])
def test_any_number_of_slots(k, impl):
    op, device = impl
    routing, y, weights, residual = case(7, k, 16, 600, device)
    expected = sum_by_loops(*detached(y.cpu()), routing, *detached(weights.cpu(), residual.cpu()))
    assert_close(op(y, routing, weights, residual=residual).cpu(), expected.float())


def test_cancellation(impl):
    """The sum is in float32: 16 bits would lose the small terms, and so would another order."""
    op, device = impl
    routing = moe_sort(torch.tensor([[0, 1, 2, 3]], device=device), 4)
    for dtype in DTYPES:
        large = 2.0**14
        y = torch.tensor([large, 1.0, 2.0, -large], device=device).to(dtype)
        y = y[:, None].expand(4, 100)
        assert op(y, routing).unique().tolist() == [3.0]
        weights = torch.tensor([[3.0, 0.5, 0.25, 3.0]], device=device)
        assert op(y, routing, weights).unique().tolist() == [1.0]
        residual = torch.full((1, 100), -2.0, device=device).to(dtype)
        assert op(y, routing, weights, residual=residual).unique().tolist() == [-1.0]


def test_cancellation_in_the_weights_gradient(impl):
    op, device = impl
    routing = moe_sort(torch.tensor([[0]], device=device), 1)
    for dtype in DTYPES:
        y = torch.tensor([[2.0**12, 1.0, -(2.0**12), 1.0] * 50], device=device).to(dtype)
        weights = torch.ones(1, 1, device=device, requires_grad=True)
        op(y, routing, weights).sum().backward()
        assert weights.grad.item() == 100.0


@pytest.mark.parametrize("align", [8, 16, 64, 128])
def test_poison(align, impl):
    """Rows that nobody reads are not read; their gradients are written, as zeros."""
    op, device = impl
    routing, y, weights, residual = case(21, 2, 6, 48, device, capacity=5, align=align)
    used = used_rows(routing)
    assert not used[-align:].any()
    assert (routing.inverse_ids < 0).any()
    y = y.detach().masked_fill(~used[:, None], torch.nan).requires_grad_()
    weights = weights.detach().masked_fill(routing.inverse_ids < 0, torch.nan).requires_grad_()
    for w in (weights, None):
        out = op(y, routing, w, residual=residual)
        assert out.isfinite().all()
        grads = torch.autograd.grad(out.square().sum(), [y] if w is None else [y, w])
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[0][~used].any()
        assert grads[0][used].any(1).all()
        if w is not None:
            assert not grads[1][routing.inverse_ids < 0].any()


@pytest.mark.parametrize("policy", ["position", "slot"])
def test_token_without_slots(policy, impl):
    op, device = impl
    ids = torch.tensor([[0, 1]] * 6 + [[-1, -1]], device=device)
    routing = moe_sort(ids, 2, capacity=2, drop_policy=policy)
    lost = (routing.inverse_ids < 0).all(1)
    assert lost.tolist() == [False] * 2 + [True] * 5
    x = torch.randn(7, 10, device=device, requires_grad=True)
    weights = torch.rand(7, 2, device=device, requires_grad=True)
    rows, _ = moe_permute(x, routing)
    out = op(rows, routing, weights)
    assert not out[lost].any()
    # Dropping does not renormalise: who kept one slot of two has that one, at its weight.
    assert_close(out[~lost], x[~lost] * weights[~lost].sum(1, keepdim=True))
    dx, dw = torch.autograd.grad(out.sum(), (x, weights), retain_graph=True)
    assert not dx[lost].any()
    assert not dw[lost].any()
    assert dx[~lost].any(1).all()
    residual = torch.randn(7, 10, device=device, requires_grad=True)
    out = op(rows, routing, weights, residual=residual)
    assert torch.equal(out[lost], residual[lost])
    (grad,) = torch.autograd.grad(out.sum(), residual)
    assert torch.equal(grad, torch.ones_like(residual))


def test_matches_the_loop_over_experts(impl):
    """A layer as models write it: every expert on the tokens that chose it, added up."""
    op, device = impl
    T, k, E, D = 40, 3, 6, 16
    ids = distinct_ids(T, k, E).to(device)
    x = torch.randn(T, D, device=device)
    weights = torch.rand(T, k, device=device)
    experts = torch.randn(E, D, D, device=device) / 4
    routing = moe_sort(ids, E, align=8)
    rows, _ = moe_permute(x, routing)
    y = torch.empty_like(rows)
    expected = torch.zeros(T, D, dtype=torch.float64, device=device)
    for e in range(E):
        begin, end = routing.expert_offsets[e : e + 2].tolist()
        y[begin:end] = rows[begin:end] @ experts[e]
        token, slot = (ids == e).nonzero(as_tuple=True)
        term = x[token].double() @ experts[e].double()
        expected.index_add_(0, token, weights[token, slot, None].double() * term)
    # Sums of 3 x 16 products: a few units of float32 more than one rounding.
    assert_close(op(y, routing, weights), expected.float(), rtol=1e-5, atol=1e-5)


def test_permutation_equivariance(impl):
    op, device = impl
    T, k, E, D = 50, 4, 12, 70
    ids = distinct_ids(T, k, E).to(device)
    x, weights = torch.randn(T, D, device=device), torch.rand(T, k, device=device)
    order = torch.randperm(T, device=device)

    def layer(x, ids, weights):
        x, weights = (tensor.clone().requires_grad_() for tensor in (x, weights))
        routing = moe_sort(ids, E, align=8)
        rows, _ = moe_permute(x, routing)
        out = op(rows * rows, routing, weights)
        return out, *torch.autograd.grad(out.square().sum(), (x, weights))

    expected = layer(x, ids, weights)
    permuted = layer(x[order], ids[order], weights[order])
    alone = layer(x[:3], ids[:3], weights[:3])  # nor do the others in the batch show
    for a, b, c in zip(expected, permuted, alone, strict=True):
        assert torch.equal(a[order], b)
        assert torch.equal(a[:3], c)


def test_large_rows_past_the_caches():
    # Over a megabyte, from where on the CPU kernel writes around its caches; 1031 floats have rows
    # at addresses that this cannot be done to.
    for D in (1024, 1031):
        routing, y, weights, _ = case(300, 2, 4, D, align=8)
        assert y.nbytes > 2**20
        for w in (weights, None):
            out = moe_unpermute(y, routing, w)
            grad = torch.randn_like(out)
            (grad_y,) = torch.autograd.grad(out, y, grad)
            assert_close(grad_y, gradients_by_loops(grad, y.detach(), routing, w)[0].float())


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_gradients_not_needed(needs, impl):
    op, device = impl
    routing, *inputs = case(9, 2, 4, 6, device)
    expected = torch.autograd.grad(
        op(*inputs[:1], routing, inputs[1], residual=inputs[2]).square().sum(), inputs
    )
    for tensor, need in zip(inputs, needs, strict=True):
        tensor.requires_grad_(bool(need))
    op(inputs[0], routing, inputs[1], residual=inputs[2]).square().sum().backward()
    for tensor, need, grad in zip(inputs, needs, expected, strict=True):
        assert (tensor.grad is not None) == bool(need)
        assert not need or torch.equal(tensor.grad, grad)


def test_saves_y_for_the_weights_alone(impl):
    op, device = impl
    routing, y, weights, _ = case(64, 2, 4, 512, device)

    def saved_bytes(*given):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            op(y, routing, *given)
        return sum(tensor.nbytes for tensor in saved)

    routing_bytes = 4 * (64 * 2 + 64 * 2)
    assert saved_bytes() <= routing_bytes
    assert saved_bytes(weights.detach()) <= routing_bytes + weights.nbytes
    assert saved_bytes(weights) <= routing_bytes + weights.nbytes + y.nbytes


def test_half_weights_count_as_float32(impl):
    op, device = impl
    routing, y, weights, _ = case(6, 2, 4, 5, device)
    half = weights.detach().bfloat16().requires_grad_()
    out = op(y, routing, half)
    assert torch.equal(out, op(y, routing, half.detach().float()))
    out.sum().backward()
    assert half.grad.dtype == torch.bfloat16
