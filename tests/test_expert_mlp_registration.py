"""expert_mlp under torch's machinery: opcheck, compile, checkpoint, autocast."""

import pytest
import torch
from expert_mlp_cases import (
    NAMES,
    assert_near,
    call,
    case_of,
    formula,
    gradients,
    leaves,
    registered_arguments,
    routing_of,
)
from interpreter import fewer, interpret_only, interpreted, skip_if_interpreted
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import m2ae_kernels
from m2ae_kernels.ops import _expert_mlp_reference

ALL = {"activation": "swiglu", "dropout_p": 0.3, "output_dropout_p": 0.2}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_registration(at, impl):
    interpret_only("0")
    _, device = impl
    op = torch.ops.m2ae_kernels.expert_mlp.default
    backward = torch.ops.m2ae_kernels.expert_mlp_backward.default
    for activation, output, S in fewer((("geglu", "silu", 2), ("gelu", "identity", None))):
        inputs, ids = case_of(6, 5, 7, 3, 4, 2, device=device, S=S, activation=activation)
        routing = routing_of(ids, 4, capacity=3, align=4)
        given = {"activation": activation, "output_activation": output, "device": device}
        arguments = registered_arguments(leaves(inputs), routing, p=0.3, at=at, **given)
        opcheck(op, (*arguments, True))
        # Weights as transposed views, no biases, nothing to save
        turned = {name: None if t is None else t.mT for name, t in inputs.items()}
        turned = {name: None if t is None else t.contiguous().mT for name, t in turned.items()}
        turned |= {"b1": None, "b2": None}
        arguments = registered_arguments(turned, routing, p=0.0, at=at, **given)
        opcheck(op, (*arguments, False))
        out, h, y = op(*arguments, True)
        grad = torch.randn_like(out)
        for mask in ([True] * 4 + [False] * 2 + [S is not None], [False] * 7):
            opcheck(backward, (grad, *arguments[:11], h, y, *arguments[11:], mask))


def test_gradcheck_of_the_reference():
    for S, activation, output, at in (
        (None, "gelu", "identity", "output"),
        (2, "swiglu", "silu", "output"),
        (2, "geglu", "gelu_tanh", "input"),
        (None, "silu", "identity", "input"),
    ):
        inputs, ids = case_of(4, 3, 2, 3, 3, 2, S=S, activation=activation)
        routing = routing_of(ids, 3, capacity=3)
        names = [name for name in NAMES if inputs[name] is not None]
        options = {"activation": activation, "output_activation": output, "dropout_p": 0.3}
        options |= {"output_dropout_p": 0.2, "apply_router_weight": at}

        def run(*tensors, inputs=inputs, ids=ids, routing=routing, names=names, options=options):
            given = inputs | dict(zip(names, tensors, strict=True))
            return call(m2ae_kernels.reference.expert_mlp, given, ids, routing, **options)

        doubles = [inputs[name].double().requires_grad_() for name in names]
        assert torch.autograd.gradcheck(run, doubles)
        assert torch.autograd.gradgradcheck(run, doubles)


def test_backward_in_float64_is_the_derivative_of_the_reference():
    # The registered backward is written out, so it is not what autograd makes of the forward.
    for S, activation, output, at in (
        (None, "gelu", "identity", 0),
        (2, "swiglu", "silu", 0),
        (2, "reglu", "relu2", 1),
        (None, "gelu_tanh", "identity", 2),
    ):
        inputs, ids = case_of(9, 5, 7, 3, 4, 2, S=S, activation=activation)
        inputs = {name: None if t is None else t.double() for name, t in inputs.items()}
        ours = leaves(inputs)
        routing = routing_of(ids, 4, capacity=4, align=2)
        given = {"activation": activation, "output_activation": output, "device": "cpu"}
        arguments = registered_arguments(ours, routing, p=0.3, at=at, **given)
        out, h, y = _expert_mlp_reference.forward(*arguments, True)
        grad = torch.randn_like(out)
        wanted = gradients(out, ours, grad)
        mask = [ours[name] is not None for name in NAMES]
        got = _expert_mlp_reference.backward(
            grad, *arguments[:11], h.detach(), y.detach(), *arguments[11:], mask
        )
        for name, tensor in zip(NAMES, got, strict=True):
            if name in wanted:
                torch.testing.assert_close(tensor, wanted[name])


def test_compiles_to_one_graph(impl):
    op, device = impl
    inputs, ids = case_of(10, 6, 7, 5, 4, 2, device=device, S=2, activation="swiglu")
    routing = routing_of(ids, 4)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    ours, theirs = leaves(inputs), leaves(inputs)
    outs = [
        call(function, given, ids, routing, **ALL)
        for function, given in ((op, ours), (compiled, theirs))
    ]
    assert torch.equal(*outs)
    upstream = torch.randn_like(outs[0])
    got, wanted = gradients(outs[1], theirs, upstream), gradients(outs[0], ours, upstream)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_drops_the_same_again(use_reentrant, impl):
    interpret_only("False")
    op, device = impl
    inputs, ids = case_of(10, 6, 7, 5, 4, 2, device=device)
    routing = routing_of(ids, 4)
    results = []
    for again in (False, True):
        ours = leaves(inputs)
        torch.manual_seed(5)  # the seed of the dropout comes from here

        def layer(x, ours=ours):
            given = ours | {"x": x}
            return call(op, given, ids, routing, dropout_p=0.5, output_dropout_p=0.2, seed=None)

        if again:
            out = checkpoint(layer, ours["x"], use_reentrant=use_reentrant)
        else:
            out = layer(ours["x"])
        out.square().sum().backward()
        results.append((out, *(ours[name].grad for name in NAMES if ours[name] is not None)))
    assert all(map(torch.equal, *results))


def test_seed_is_drawn_from_torch(impl):
    op, device = impl
    inputs, ids = case_of(30, 6, 16, 8, 4, 2, device=device)
    routing = routing_of(ids, 4)
    outs = []
    for start in (1, 1, 2):
        torch.manual_seed(start)
        outs.append(call(op, inputs, ids, routing, dropout_p=0.5, seed=None))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    state = torch.get_rng_state()
    call(op, inputs, ids, routing)  # no dropout, no draw
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_keeps_the_mean(impl):
    op, device = impl
    inputs, ids = case_of(1, 6, 32, 4, 3, 2, device=device)
    T = 500 if interpreted() else 2000
    inputs = inputs | {name: inputs[name].expand(T, -1) for name in ("x", "topk_weights")}
    ids = ids.expand(T, -1).contiguous()
    routing = routing_of(ids, 3)
    plain = call(op, inputs, ids, routing)[0]
    dropped = call(op, inputs, ids, routing, dropout_p=0.3, output_dropout_p=0.3)
    # Six standard errors of the mean of T rows, each with masks of its own.
    assert ((dropped.mean(0) - plain).abs() < 6 * dropped.std(0) / T**0.5).all()


def test_autocast_rounds_the_inputs(impl):
    op, device = impl
    inputs, ids = case_of(20, 16, 24, 16, 4, 2, device=device, S=2)
    routing = routing_of(ids, 4)
    ours = leaves(inputs)
    with torch.autocast(device, torch.bfloat16):
        out = call(op, ours, ids, routing)
    rounded = {
        name: tensor.bfloat16() if name != "topk_weights" else tensor
        for name, tensor in inputs.items()
    }
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, call(op, rounded, ids, routing))
    # Gradients arrive in float32, also if the backward runs under autocast.
    upstream = torch.randn_like(out)
    with torch.autocast(device, torch.bfloat16):
        grads = gradients(out, ours, upstream)
    exact = leaves(rounded)
    expected = formula(exact, ids, routing.inverse_ids)
    wanted = gradients(expected, exact, upstream.double())
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert_near(grad, wanted[name].double(), torch.bfloat16, name)


def test_only_what_needs_a_gradient(impl):
    op, device = impl
    inputs, ids = case_of(20, 6, 7, 5, 4, 2, device=device, S=2)
    routing = routing_of(ids, 4)
    ours = leaves(inputs)
    out = call(op, ours, ids, routing, dropout_p=0.2)
    upstream = torch.randn_like(out)
    wanted = gradients(out, ours, upstream)
    for name in NAMES:
        alone = inputs | {name: inputs[name].clone().requires_grad_()}
        out = call(op, alone, ids, routing, dropout_p=0.2)
        (grad,) = torch.autograd.grad(out, alone[name], upstream)
        assert torch.equal(grad, wanted[name])


def test_repeats_bit_for_bit(impl):
    op, device = impl
    inputs, ids = case_of(50 if interpreted() else 200, 24, 40, 24, 5, 3, device=device)
    routing = routing_of(ids, 5)
    first = None
    for _ in fewer(range(3), 2):
        ours = leaves(inputs)
        out = call(op, ours, ids, routing, dropout_p=0.2)
        result = (out, *gradients(out, ours, torch.ones_like(out)).values())
        first = first or result
        assert all(map(torch.equal, first, result))


def test_threads_change_nothing(impl):
    skip_if_interpreted("in one thread")
    op, device = impl
    threads = torch.get_num_threads()
    results = []
    try:
        # Groups of rows, splits of hidden channels and experts, more and fewer than threads.
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            inputs, ids = case_of(600, 20, 600, 12, 2, 1, device=device, S=2)
            ours = leaves(inputs)
            out = call(op, ours, ids, routing_of(ids, 2), dropout_p=0.2)
            results.append((out, *gradients(out, ours, torch.ones_like(out)).values()))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_second_derivative_is_refused(impl):
    op, device = impl
    inputs, ids = case_of(4, 6, 7, 5, 4, 2, device=device)
    ours = leaves(inputs)
    out = call(op, ours, ids, routing_of(ids, 4))
    (grad,) = torch.autograd.grad(out.square().sum(), ours["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"expert_mlp: expected one backward, got a second"):
        grad.sum().backward()


def test_strides(impl):
    op, device = impl
    inputs, ids = case_of(20, 6, 8, 6, 4, 2, device=device, S=2)
    routing = routing_of(ids, 4)
    expected = call(op, inputs, ids, routing)
    strided = {name: tensor.mT.contiguous().mT for name, tensor in inputs.items()}
    strided["b1"] = torch.stack([inputs["b1"]] * 2, -1)[..., 0]
    ours = leaves(inputs)
    wanted = gradients(call(op, ours, ids, routing), ours, torch.ones_like(expected))
    for tensor in strided.values():
        tensor.requires_grad_()
    out = call(op, strided, ids, routing)
    assert torch.equal(out, expected)
    grads = gradients(out, strided, torch.ones(1, 1, device=device).expand(out.shape))
    for name, grad in grads.items():
        assert_near(grad, wanted[name].double(), torch.float32, name)
