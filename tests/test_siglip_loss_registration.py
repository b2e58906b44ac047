"""siglip_loss under autograd, autocast, torch.compile and the registration's own checks."""

import itertools
import math
import pickle
import subprocess
import sys

import pytest
import torch
from interpreter import fewer
from test_siglip_loss import features, numbers
from torch.library import opcheck

import m2ae_kernels
from m2ae_kernels import _library, reference


def served_by_reference():
    return _library.served_by("siglip_loss", "cpu").startswith("reference")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=4)), ids=str)
def test_gradients_that_are_needed(needed, reduction, impl):
    op, device = impl
    inputs = *features(5, 6, D=4, device=device), *numbers(8.0, -3.0, device=device)
    wanted = torch.autograd.grad(op(*inputs, normalize=True, reduction=reduction).sum(), inputs)
    for tensor, needs in zip(inputs, needed, strict=True):
        tensor.requires_grad_(needs)
    loss = op(*inputs, normalize=True, reduction=reduction)
    assert loss.requires_grad == any(needed)
    for _ in range(2 * any(needed)):
        loss.sum().backward(retain_graph=True)
    for tensor, needs, grad in zip(inputs, needed, wanted, strict=True):
        assert torch.equal(tensor.grad, 2 * grad) if needs else tensor.grad is None


def test_zero_upstream(impl):
    op, device = impl
    inputs = *features(5, 6, D=4, device=device), *numbers(8.0, -3.0, device=device)
    for reduction in ("mean", "sum", "none"):
        grads = torch.autograd.grad(op(*inputs, reduction=reduction).sum() * 0, inputs)
        assert not any(grad.any() for grad in grads)


def test_gradients_repeat_bitwise(impl):
    op, device = impl
    inputs = *features(300, 280, D=16, device=device), *numbers(8.0, -3.0, device=device)
    target = torch.randint(0, 20, (300,), device=device)
    for reduction in ("mean", "none"):
        runs = []
        for _ in fewer(range(5), 2):
            loss = op(*inputs, target=target, reduction=reduction)
            runs.append((loss, *torch.autograd.grad(loss.sum(), inputs)))
        assert all(all(map(torch.equal, run, runs[0])) for run in runs)


def test_autocast_rounds_features_but_not_the_numbers(impl):
    op, device = impl
    images, texts = features(9, 9, D=6, device=device)
    scale, bias = numbers(14.2857, -9.1234, device=device)
    with torch.autocast(device, torch.bfloat16):
        loss = op(images, texts, scale, bias, normalize=True)
        assert torch.equal(op(images.bfloat16(), texts, scale, bias, normalize=True), loss)
        loss.backward()
        op(images, texts, scale, bias, reduction="none").sum().backward()
    assert loss.dtype == images.grad.dtype == torch.float32
    assert torch.equal(loss, op(images.bfloat16(), texts.bfloat16(), scale, bias, normalize=True))
    exactly = reference.siglip_loss(images.double(), texts.double(), scale, bias)
    with torch.autocast(device, torch.bfloat16):
        again = reference.siglip_loss(images.double(), texts.double(), scale, bias)
    assert torch.equal(again, exactly)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_derivative_is_refused(reduction, impl):
    op, device = impl
    inputs = *features(4, 4, D=5, device=device), *numbers(8.0, -3.0, device=device)
    for tensor in inputs:
        loss = op(*inputs, reduction=reduction).sum()
        (grad,) = torch.autograd.grad(loss, tensor, create_graph=True)
        with pytest.raises(RuntimeError, match=r"siglip_loss: expected one backward, got a second"):
            grad.sum().backward()


def test_nothing_quadratic_is_saved(impl):
    op, device = impl
    inputs = *features(200, 300, D=4, device=device), *numbers(8.0, -3.0, device=device)
    for reduction in ("mean", "none"):
        loss = op(*inputs, normalize=True, reduction=reduction)
        made_by = loss.grad_fn if reduction == "none" else loss.grad_fn.next_functions[0][0]
        assert max(t.numel() for t in made_by.saved_tensors if t is not None) == 300 * 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_matrix_of_logits_is_held():
    if served_by_reference():
        pytest.skip("the reference holds some")
    code = """
import torch
from m2ae_kernels import siglip_loss
torch.set_num_threads(1)
def call(N, reduction):
    rows = [torch.randn(N, 32).requires_grad_() for _ in range(2)]
    siglip_loss(*rows, 10.0, -10.0, normalize=True, reduction=reduction).sum().backward()
def kilobytes(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
for reduction in ("mean", "none"):
    call(64, reduction)
before = kilobytes("VmRSS")
for reduction in ("mean", "none"):
    call(8192, reduction)
print(kilobytes("VmHWM") - before)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 64 << 10  # logits would be 256 MB


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_more_entries_than_int32_can_count(reduction):
    if served_by_reference():
        pytest.skip("the reference would hold them")
    N = 46_400
    images = torch.full((N, 1), 0.5, requires_grad=True)
    texts = torch.full((N, 1), 0.25, requires_grad=True)
    inputs = images, texts, *numbers(8.0, -9.0)
    loss = m2ae_kernels.siglip_loss(*inputs, reduction=reduction)
    softplus, sigma = math.log1p(math.exp(-8)), 1 / (1 + math.exp(8))
    total = N * (N * softplus + 8)
    by_logits = N * (N * sigma - 1)
    torch.testing.assert_close(loss.sum().item(), total, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(loss.sum(), inputs)
    for grad, wanted in zip(grads, (8 * 0.25, 8 * 0.5, 0.125, 1), strict=True):
        torch.testing.assert_close(grad.sum().item(), wanted * by_logits, rtol=1e-4, atol=0)


def test_no_gradient_is_made_without_a_need(impl):
    _, device = impl
    inputs = *features(4, 6, D=5, device=device), *numbers(8.0, -3.0, device=device)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.m2ae_kernels.siglip_loss.default:
                made.append(list(args[16]))
            return function(*args, **(kwargs or {}))

    with Watch():
        m2ae_kernels.siglip_loss(*inputs)
        m2ae_kernels.siglip_loss(inputs[0], *(t.detach() for t in inputs[1:]))
        m2ae_kernels.siglip_loss(*inputs, reduction="none")
        with torch.no_grad():
            m2ae_kernels.siglip_loss(*inputs)
    nothing = [False] * 4
    assert made == [[True] * 4, [True, False, False, False], nothing, nothing]


def test_registration(impl):
    _, device = impl
    images, texts = features(6, 7, D=5, device=device)
    scale, bias = numbers(8.0, -3.0, device=device)
    target = torch.tensor([3, 3, -100, 0, 6, 1], device=device)
    mask = torch.tensor([True] * 6 + [False], device=device)
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 0], device=device)
    weight = torch.rand(6, device=device)
    op = torch.ops.m2ae_kernels.siglip_loss.default
    inputs, numbers_only = (images, texts, scale, bias), (scale, bias)
    rows = (target, mask[1:], mask, ids[1:], ids, weight)
    everything, nothing, some = [True] * 4, [False] * 4, [True, False, False, True]
    permuted = [t.detach().mT.contiguous().mT.requires_grad_() for t in (images, texts)]
    plain, no_rows = (1, -100, 0, False, 1e-12), (None,) * 6
    opcheck(op, (*inputs, *rows, 0, -100, 2, True, 1e-12, False, everything, False, 1 << 20))
    opcheck(op, (*inputs, *rows, 0, -100, 1, True, 1e-12, True, nothing, False, 1 << 20))
    opcheck(op, (*permuted, *numbers_only, *no_rows, *plain, False, nothing, False, 0))
    opcheck(op, (images[:0], texts, scale, bias, *no_rows, *plain, False, everything, False, 0))
    detached = [t.detach() for t in inputs]
    backward = torch.ops.m2ae_kernels.siglip_loss_backward.default
    options = (0, -100, 2, True, 1e-12)
    loss, *_, rnorm_q, rnorm_k = op(*detached, *rows, *options, True, nothing, False, 1 << 20)
    saved = (*detached, *rows, rnorm_q, rnorm_k, *options, False, 1 << 20)
    opcheck(backward, (loss, *saved, everything))
    opcheck(backward, (loss.sum(), *saved, some))
    loss, *stored, _, _ = op(*detached, *rows, *options, False, everything, False, 1 << 20)
    stored_backward = torch.ops.m2ae_kernels.siglip_loss_backward_stored.default
    opcheck(stored_backward, (loss, *detached, *stored, some))


def test_a_sum_whose_gradients_were_not_made(impl):
    _, device = impl
    inputs = *features(6, 7, D=5, device=device), *numbers(8.0, -3.0, device=device)
    options = (*(None,) * 6, 0, -100, 0, True, 1e-12, False)
    losses = [
        torch.ops.m2ae_kernels.siglip_loss(*inputs, *options, [made] * 4, False, 0)[0]
        for made in (True, False)
    ]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(3 * loss, inputs) for loss in losses]
    for stored, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(stored, recomputed)


def test_compiles_to_one_graph(impl):
    op, device = impl
    inputs = *features(6, 7, D=5, device=device), *numbers(8.0, -3.0, device=device)
    target = torch.tensor([3, 3, -100, 0, 6, 1], device=device)
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 0], device=device)
    mask = torch.tensor([True] * 6 + [False], device=device)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    masked = {"target": target, "key_mask": mask, "query_mask": mask[1:], "normalize": True}
    grouped = {"query_ids": ids[1:], "key_ids": ids, "same_id": "positive", "reduction": "none"}
    for given in ({}, masked, grouped, masked | {"weight": torch.rand(6, device=device)}):
        expected, actual = op(*inputs, **given).sum(), compiled(*inputs, **given).sum()
        assert torch.equal(expected, actual)
        grads = (torch.autograd.grad(loss, inputs) for loss in (actual, expected))
        assert all(map(torch.equal, *grads))
    for N, M in ((11, 13), (12, 15)):  # for any N and M from here on
        more = features(N, M, D=5, device=device)
        assert torch.equal(compiled(*more, 3.0, -1.0), op(*more, 3.0, -1.0))
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(compiled(*inputs), op(*inputs))


def test_pickles():
    assert pickle.loads(pickle.dumps(m2ae_kernels.siglip_loss)) is m2ae_kernels.siglip_loss
