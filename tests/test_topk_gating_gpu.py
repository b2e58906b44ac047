"""topk_gating on a GPU: no waits, graphs, streams, the CPU's integers, more than 2^31 logits."""

import pytest
import torch
from topk_gating_cases import ALL, SCORES
from torch.testing import assert_close

from m2ae_kernels import topk_gating

pytestmark = pytest.mark.gpu
# Rows of a thread and of a warp: (T, E, k)
SHAPES = [(3000, 12, 4), (3000, 32, 8), (700, 64, 8), (700, 256, 8), (70, 1024, 40)]


@pytest.fixture
def no_sync():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def inputs(T, E, dtype=torch.float32):
    """Logits, shift, bias and mask."""
    logits = torch.randn(T, E, device="cuda").to(dtype).requires_grad_()
    shift = torch.randn(2, E, device="cuda", requires_grad=True)
    mask = torch.rand(T, device="cuda") < 0.9
    return logits, shift, torch.randn(E, device="cuda"), mask


def step(k, logits, shift, bias, mask, **given):
    output = topk_gating(
        logits, k, logit_shift=shift, expert_bias=bias, token_mask=mask, **given, **ALL
    )
    loss = output.topk_weights.square().sum() + output.logsumexp.sum() + output.entropy.sum()
    loss = loss + output.probs_sum.square().sum()
    return *output, *torch.autograd.grad(loss, (logits, shift))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T,E,k", SHAPES)
def test_no_sync(T, E, k, dtype, no_sync):
    tensors = inputs(T, E, dtype)
    step(k, *tensors)
    no_sync()
    step(k, *tensors)


@pytest.mark.parametrize("T,E,k", SHAPES)
def test_forward_and_backward_in_one_graph(T, E, k):
    tensors = inputs(T, E)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(k, *tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(k, *tensors)
    for _ in range(3):  # other logits at each replay
        with torch.no_grad():
            for tensor, value in zip(tensors, inputs(T, E), strict=True):
                tensor.copy_(value)
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert all(map(torch.equal, replayed, step(k, *tensors)))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("T,E,k", [*SHAPES, (0, 12, 4), (200_000, 12, 4), (20_000, 256, 8)])
def test_chooses_as_the_cpu_does(T, E, k, score):
    logits = torch.randint(-40, 40, (T, E), device="cuda").float() / 8  # many ties
    here = topk_gating(logits, k, score_function=score, **ALL)
    there = topk_gating(logits.cpu(), k, score_function=score, **ALL)
    assert torch.equal(here.topk_ids.cpu(), there.topk_ids)
    assert torch.equal(here.tokens_per_expert.cpu(), there.tokens_per_expert)
    for x, y in zip(here[:1] + here[2:5], there[:1] + there[2:5], strict=True):
        assert_close(x.cpu(), y)


def test_another_stream():
    tensors = inputs(3000, 12)
    expected = step(4, *tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        logits, shift, bias, mask = (t.detach().clone() for t in tensors)  # not there before
        result = step(4, logits.requires_grad_(), shift.requires_grad_(), bias, mask)
    stream.synchronize()
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("E,k", [(12, 4), (256, 8)])
def test_more_numbers_than_2_to_the_31(E, k):
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    T = 2**31 // E + 1000
    logits = torch.empty(T, E, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    output = topk_gating(logits, k, **ALL)
    (grad,) = torch.autograd.grad(output.topk_weights.square().sum() + output.entropy.sum(), logits)
    last = logits.detach()[-100:].clone().requires_grad_()
    alone = topk_gating(last, k, **ALL)
    loss = alone.topk_weights.square().sum() + alone.entropy.sum()
    for x, y in zip(output[:4], alone[:4], strict=True):
        assert torch.equal(x[-100:], y)
    assert torch.equal(grad[-100:], torch.autograd.grad(loss, last)[0])
    assert output.tokens_per_expert.sum() == T * k
    # Each row's shares sum to 1 within a few roundings, which average out.
    assert_close(output.probs_sum.double().sum().item(), float(T), rtol=1e-6, atol=0)
