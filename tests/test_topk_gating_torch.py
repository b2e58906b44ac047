"""topk_gating among torch's machinery: registration, compiling, strides, modes, threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from topk_gating_cases import ALL, SCORES
from torch.library import opcheck

from m2ae_kernels import reference, topk_gating


def test_strides_and_modes(impl):
    op, device = impl
    logits = torch.randn(7, 9, device=device).mT
    expected = op(logits.contiguous(), 3, **ALL)
    assert all(map(torch.equal, op(logits, 3, **ALL), expected))
    wide = torch.randn(9, 20, device=device)
    assert all(map(torch.equal, op(wide[:, 3:12], 3, **ALL), op(wide[:, 3:12].clone(), 3, **ALL)))
    with torch.inference_mode():
        assert all(map(torch.equal, op(logits, 3, **ALL), expected))
    with torch.autocast(device, torch.bfloat16):  # has no say
        assert all(map(torch.equal, op(logits, 3, **ALL), expected))


def test_second_derivative_is_refused(impl):
    op, device = impl
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    weights = op(logits, 2).topk_weights
    (grad,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"topk_gating: expected one backward, got a second"):
        grad.sum().backward()


def test_registration(impl):
    _, device = impl
    op = torch.ops.m2ae_kernels.topk_gating.default
    logits = torch.randn(6, 8, device=device, requires_grad=True)
    shift = torch.randn(2, 8, device=device, requires_grad=True)
    bias = torch.randn(8, device=device)
    mask = torch.tensor([True, True, False, True, True, True], device=device)
    opcheck(op, (logits, None, None, mask, 2, 0, True, 1, 1, 1, 2.5, True, True, False))
    opcheck(op, (logits, shift, bias, mask, 2, 1, True, 4, 2, 2, 2.5, True, True, False))
    plain = (None, None, None, 2, 2, False, 1, 1, 1, 1.0, False, False, True)
    opcheck(op, (logits.detach().mT.contiguous().mT, *plain))


def test_registration_of_the_backward(impl):
    _, device = impl
    backward = torch.ops.m2ae_kernels.topk_gating_backward.default
    logits, shift = torch.randn(6, 5, device=device), torch.randn(2, 5, device=device)
    mask = torch.tensor([True, True, False, True, True, True], device=device)
    ids = topk_gating(logits, 2, logit_shift=shift).topk_ids
    grads = (torch.randn(12, 2), torch.randn(12), torch.randn(12), torch.randn(5))
    grads = tuple(grad.to(device) for grad in grads)
    for needed in ([True, True], [True, False], [False, True]):
        opcheck(backward, (*grads, logits, shift, mask, ids, 0, True, 2.5, False, needed))
    nothing = (None, None, None, None)
    strided = logits.mT.contiguous().mT
    ids = ids[:6].clone()
    opcheck(backward, (*nothing, strided, None, None, ids, 1, False, 1.0, True, [True, False]))


@pytest.mark.parametrize("score", SCORES)
def test_compiles_to_one_graph(score, impl):
    op, device = impl
    logits = torch.randn(6, 8, device=device, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True, True], device=device)
    grouped = {"n_group": 4, "topk_group": 2, "expert_bias": torch.randn(8, device=device)}
    shifted = {"logit_shift": torch.randn(2, 8, device=device), "token_mask": mask, **ALL}
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for given in ({}, {"norm_topk_prob": True, **shifted}, grouped):
        given = {"score_function": score, **given}
        expected, actual = op(logits, 2, **given), compiled(logits, 2, **given)
        for x, y in zip(expected, actual, strict=True):
            assert x is y is None or torch.equal(x, y)
        grads = [
            torch.autograd.grad(o.topk_weights.square().sum(), logits)[0]
            for o in (expected, actual)
        ]
        assert torch.equal(*grads)


def test_compiles_once_for_every_number_of_tokens(impl):
    op, device = impl
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend=backend, dynamic=True)
    for T in (6, 11, 40):
        logits = torch.randn(T, 5, device=device)
        for x, y in zip(compiled(logits, 2, **ALL), op(logits, 2, **ALL), strict=True):
            assert torch.equal(x, y)
    assert len(graphs) == 1


@pytest.mark.parametrize("score", SCORES)
def test_reference_exports(score):
    class Gate(torch.nn.Module):
        def forward(self, logits):
            output = reference.topk_gating(logits, 3, score_function=score, norm_topk_prob=True)
            return output.topk_weights, output.topk_ids

    logits = torch.randn(6, 8)
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(Gate(), (logits,), dynamic_shapes=({0: tokens},))
    more = torch.randn(11, 8)
    assert all(map(torch.equal, program.module()(more), Gate()(more)))


def test_repeats_for_any_number_of_threads(impl, request):
    if request.node.callspec.params["impl"] == "reference":
        pytest.skip("torch may cut its own sums by threads")
    op, device = impl
    logits = torch.randn(20011, 12, device=device, requires_grad=True)
    shift = torch.randn(2, 12, device=device, requires_grad=True)
    upstream = torch.randn(12, device=device)
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            output = op(logits, 4, logit_shift=shift, **ALL)
            loss = output.topk_weights.square().sum() + (output.probs_sum * upstream).sum()
            results.append((*output, *torch.autograd.grad(loss, [logits, shift])))
    finally:
        torch.set_num_threads(1)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_narrower_vectors(isa):
    # The lanes of a vector are rows: with fewer of them, others are the last, odd ones. A machine
    # without the set runs the best it has.
    tests = Path(__file__).parent
    files = [
        tests / f"test_topk_gating{part}.py" for part in ("", "_scores", "_groups", "_special")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "registered", *map(str, files)]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
