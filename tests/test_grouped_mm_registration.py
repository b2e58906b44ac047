"""grouped_mm under torch's machinery: opcheck, compile, checkpoint, autocast, derivatives."""

import pytest
import torch
from expert_mlp_cases import assert_near
from grouped_mm_cases import FORMS, case_of, leaves, of_leaves
from interpreter import fewer, interpret_only
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import m2ae_kernels
from m2ae_kernels.ops._activations import ACTIVATIONS


@pytest.mark.parametrize("form", FORMS)
def test_registration(form, impl):
    interpret_only("2x3", "2x2")
    _, device = impl
    op = torch.ops.m2ae_kernels.grouped_mm.default
    backward = torch.ops.m2ae_kernels.grouped_mm_backward.default
    operands = case_of(form, [3, 0, 2], 4, 6, 8, tail=2, device=device)
    turned = {n: t.mT.contiguous().mT if n.startswith("mat") else t for n, t in operands.items()}
    activations = ("swiglu", "gelu", "identity") if form[2] == "3" else ("identity",)
    for name in fewer(activations):
        activation = ACTIVATIONS.index(name)
        for given in fewer((leaves(operands), turned | {"bias": None})):
            arguments = tuple(given.values())
            for dtype in fewer((torch.float32, torch.bfloat16)):
                opcheck(op, (*arguments, None, activation, dtype, activation != 0))
            out, h = op(*arguments, None, activation, torch.float32, activation != 0)
            grad = torch.randn_like(out)
            plain = tuple(None if t is None else t.detach() for t in arguments)
            for mask in ([True, True, given["bias"] is not None], [False] * 3):
                opcheck(backward, (grad, *plain, None, h.detach(), activation, mask))
    if form == "2x3":
        a_ids = torch.tensor([4, 0, -1, 4, 2], dtype=torch.int32, device=device)
        given = leaves(operands)
        opcheck(op, (*given.values(), a_ids, 1, torch.float32, True))
        opcheck(op, (*operands.values(), a_ids, 0, torch.float32, False))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_the_reference(form):
    operands = case_of(form, [2, 0, 3], 2, 3, 4, tail=1)
    names = [name for name in ("mat_a", "mat_b", "bias") if operands[name] is not None]
    a_ids = torch.tensor([4, 0, -1, 4, 2, 1], dtype=torch.int32) if form == "2x3" else None
    for activation in ("identity", "geglu") if form[2] == "3" else ("identity",):

        def run(*tensors, activation=activation):
            given = operands | dict(zip(names, tensors, strict=True))
            options = {"activation": activation, "a_ids": a_ids}
            return m2ae_kernels.reference.grouped_mm(**given, **options)

        doubles = [operands[name].double().requires_grad_() for name in names]
        assert torch.autograd.gradcheck(run, doubles)
        assert torch.autograd.gradgradcheck(run, doubles)


def test_compiles_to_one_graph(impl):
    op, device = impl
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for form in FORMS:
        operands = case_of(form, [3, 0, 2], 4, 6, 8, tail=2, device=device)
        activation = "swiglu" if form[2] == "3" else None
        ours, theirs = leaves(operands), leaves(operands)
        out, same = op(**ours, activation=activation), compiled(**theirs, activation=activation)
        assert torch.equal(out, same)
        upstream = torch.randn_like(out)
        wanted, got = of_leaves(out, ours, upstream), of_leaves(same, theirs, upstream)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_checkpoint(impl):
    op, device = impl
    operands = case_of("2x3", [3, 0, 2], 0, 6, 8, device=device)
    results = []
    for again in (False, True):
        ours = leaves(operands)

        def layer(mat_a, ours=ours):
            return op(**(ours | {"mat_a": mat_a}), activation="gelu")

        given = ours["mat_a"]
        out = checkpoint(layer, given, use_reentrant=False) if again else layer(given)
        results.append((out, *of_leaves(out, ours, torch.ones_like(out)).values()))
    assert all(map(torch.equal, *results))


def test_autocast_rounds_the_operands(impl):
    op, device = impl
    operands = case_of("2x3", [3, 0, 9], 0, 16, 8, device=device)
    ours = leaves(operands)
    with torch.autocast(device, torch.bfloat16):
        out = op(**ours)
        grads = of_leaves(out, ours, torch.ones_like(out))
    rounded = {n: t if n == "offs" else t.bfloat16() for n, t in operands.items()}
    assert torch.equal(out, op(**rounded))
    assert out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    exact = leaves(rounded)
    wanted = of_leaves(op(**exact), exact, torch.ones_like(out))
    for name, grad in grads.items():
        assert_near(grad, wanted[name].double(), torch.bfloat16, name)


def test_saved_memory(impl):
    op, device = impl
    for activation, h in ((None, 0), ("gelu", 12 * 8), ("swiglu", 12 * 8)):
        ours = leaves(case_of("2x3", [3, 0, 9], 0, 16, 8, device=device))
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            op(**ours, activation=activation)
        given = sum(tensor.nbytes for tensor in ours.values())
        assert sum(saved.values()) <= given + 4 * h


def test_only_what_needs_a_gradient(impl):
    op, device = impl
    for form in FORMS:
        operands = case_of(form, [3, 0, 2], 4, 6, 8, tail=2, device=device)
        ours = leaves(operands)
        out = op(**ours)
        upstream = torch.randn_like(out)
        for name, wanted in of_leaves(out, ours, upstream).items():
            alone = operands | {name: operands[name].clone().requires_grad_()}
            (grad,) = torch.autograd.grad(op(**alone), alone[name], upstream)
            assert torch.equal(grad, wanted)


def test_second_derivative_is_refused(impl):
    op, device = impl
    ours = leaves(case_of("2x3", [3, 0, 2], 0, 6, 8, device=device))
    (grad,) = torch.autograd.grad(op(**ours).square().sum(), ours["mat_a"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"grouped_mm: expected one backward, got a second"):
        grad.sum().backward()
