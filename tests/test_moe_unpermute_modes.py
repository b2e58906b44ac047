"""moe_unpermute with `out`, strides, threads, derivatives, registration: what is not its values."""

import pytest
import torch
from moe_cases import distinct_ids, sum_by_loops
from test_moe_unpermute import case, detached
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.testing import assert_close

from m2ae_kernels import moe_permute, moe_sort, moe_unpermute, reference


def test_out(impl):
    op, device = impl
    routing, y, weights, residual = case(30, 3, 7, 50, device, align=8)
    inputs = y.detach(), routing, weights.detach()
    residual = residual.detach()
    plain, added = op(*inputs), op(*inputs, residual=residual)
    out = torch.full_like(plain, torch.nan)
    version = out._version
    assert op(*inputs, out=out) is out
    assert out._version > version
    # To the last bit only where both are of one kernel: test_out_has_the_same_bits.
    assert_close(out, plain)
    assert_close(op(*inputs, residual=residual, out=out), added)
    assert op(*inputs, residual=residual, out=residual) is residual  # in its place
    assert_close(residual, added)
    with torch.no_grad():  # where tensors that require a gradient are welcome
        assert_close(op(y, routing, weights, out=out), plain)
    with torch.inference_mode():  # whose tensors have no version
        inferred = torch.empty_like(plain)
        assert_close(op(*inputs, out=inferred), plain)
    empty = moe_sort(torch.empty(0, 2, dtype=torch.int32, device=device), 3)
    nothing = torch.empty(0, 50, device=device)
    assert op(nothing, empty, out=torch.empty_like(nothing)).shape == (0, 50)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_out_has_the_same_bits(device):
    routing, *inputs = case(30, 3, 7, 50, device, align=8)
    y, weights, residual = detached(*inputs)
    for op in (moe_unpermute, reference.moe_unpermute):
        expected = op(y, routing, weights, residual=residual)
        out = torch.full_like(expected, torch.nan)
        assert torch.equal(op(y, routing, weights, residual=residual, out=out), expected)
        in_place = residual.clone()
        op(y, routing, weights, residual=in_place, out=in_place)
        assert torch.equal(in_place, expected)


def test_strides_and_modes(impl):
    op, device = impl
    routing, y, weights, residual = case(20, 2, 4, 60, device, align=8)
    y, weights, residual = detached(y, weights, residual)
    weights = weights.t().contiguous().t()
    views = [
        lambda t: t[:, 5:21],
        lambda t: t[:, ::3],
        lambda t: t.t().contiguous().t(),
        lambda t: t[:1].expand_as(t),
    ]
    for view in views:
        given = {"residual": view(residual)}
        dense = {"residual": view(residual).clone().contiguous()}
        expected = op(view(y).clone().contiguous(), routing, weights.contiguous(), **dense)
        assert torch.equal(op(view(y), routing, weights, **given), expected)
        with torch.inference_mode():
            assert torch.equal(op(view(y), routing, weights, **given), expected)
        with torch.autocast(device, torch.bfloat16):  # has no say
            assert torch.equal(op(view(y), routing, weights, **given), expected)
        y.requires_grad_()
        weights.requires_grad_()
        out = op(y, routing, weights)
        grad = view(torch.randn_like(out)).expand(20, -1)[:, :1].expand_as(out)
        actual = torch.autograd.grad(out, (y, weights), grad, retain_graph=True)
        wanted = torch.autograd.grad(out, (y, weights), grad.contiguous())
        assert all(map(torch.equal, actual, wanted))
        y, weights = detached(y, weights)


def test_repeats(impl):
    op, device = impl
    routing, y, weights, residual = case(200, 4, 12, 70, device, capacity=50)
    grad = torch.randn(200, 70, device=device)
    results = []
    for _ in range(5):
        out = op(y, routing, weights, residual=residual)
        results.append((out, *torch.autograd.grad(out, (y, weights, residual), grad)))
    assert all(all(map(torch.equal, result, results[0])) for result in results)


def test_threads():
    routing, y, weights, _ = case(3001, 2, 12, 130, capacity=480, align=8)
    grad = torch.randn(3001, 130)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = moe_unpermute(y, routing, weights)
            results.append((out, *torch.autograd.grad(out, (y, weights), grad)))
    finally:
        torch.set_num_threads(1)
    assert all(all(map(torch.equal, result, results[0])) for result in results)


def test_second_derivative_is_refused(impl):
    op, device = impl
    routing, y, weights, _ = case(6, 2, 4, 3, device)
    (grad,) = torch.autograd.grad(op(y, routing, weights).square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match=r"moe_unpermute: expected one backward, got a second"):
        grad.sum().backward()


def test_reference_gradients():
    for given in ({}, {"capacity": 3, "align": 8}):
        routing, *inputs = case(7, 2, 4, 3, **given)
        inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]

        def layer(y, weights, residual, routing=routing):
            return reference.moe_unpermute(y, routing, weights, residual=residual)

        assert gradcheck(layer, inputs)
        expected = sum_by_loops(*detached(inputs[0]), routing, *detached(*inputs[1:]))
        assert_close(layer(*inputs), expected)


def test_registration(impl):
    _, device = impl
    routing, y, weights, residual = case(6, 2, 5, 7, device, align=4)
    ids = routing.sorted_ids, routing.inverse_ids
    op = torch.ops.m2ae_kernels.moe_unpermute.default
    opcheck(op, (y, *ids, weights, residual))
    opcheck(op, (y.detach().bfloat16().t().contiguous().t(), *ids, None, None))
    backward = torch.ops.m2ae_kernels.moe_unpermute_backward.default
    grad = torch.randn(6, 7, device=device)
    y, weights, residual = detached(y, weights, residual)
    opcheck(backward, (grad, y, *ids, weights, [True, True]))
    opcheck(backward, (grad, None, *ids, weights, [True, False]))
    opcheck(backward, (grad, y, *ids, weights, [False, True]))
    opcheck(backward, (grad.t().contiguous().t(), None, *ids, None, [True, False]))
    out = torch.empty(6, 7, device=device)
    opcheck(torch.ops.m2ae_kernels.moe_unpermute_out.default, (y, *ids, weights, residual, out))


def test_compiles_to_one_graph(impl):
    op, device = impl

    def layer(x, ids, weights):
        routing = moe_sort(ids, 5, align=4)
        return op(moe_permute(x, routing)[0], routing, weights, residual=x)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (6, 11, 30):
        ids = distinct_ids(T, 2, 5).to(device)
        x = torch.randn(T, 7, device=device, requires_grad=True)
        weights = torch.rand(T, 2, device=device, requires_grad=True)
        expected, actual = layer(x, ids, weights), compiled(x, ids, weights)
        assert torch.equal(actual, expected)
        grads = [torch.autograd.grad(o.square().sum(), (x, weights)) for o in (actual, expected)]
        assert all(map(torch.equal, *grads))
