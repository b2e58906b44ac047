"""nn.MoE on a GPU: nothing waits, and forward and backward are one CUDA graph."""

import pytest
import torch
from gpu_streams import captured, own_stream

from m2ae_kernels.nn import GroupedExperts, MoE, TopKRouter

pytestmark = pytest.mark.gpu
T, D, H, E, k = 1000, 64, 128, 12, 4


def layer(dropout=0.0, **given):
    experts = GroupedExperts(E, D, H, dropout_p=dropout, output_dropout_p=dropout)
    return MoE(TopKRouter(D, E, k, bias=True), experts, **given).cuda()


def step(moe, x, shift):
    out, for_losses = moe(x, shift=shift)
    losses = [for_losses[name].square().mean() for name in ("logsumexp", "entropy", "probs_sum")]
    loss = out.square().mean() + sum(losses)
    return out, *torch.autograd.grad(loss, [x, shift, *moe.parameters()])


def inputs():
    return [torch.randn(n, D, device="cuda").requires_grad_() for n in (T, 2)]


@pytest.mark.parametrize("given", [{}, {"dropout": 0.1}, {"capacity": 300}], ids=str)
def test_no_sync(given, no_sync):
    moe, tokens = layer(**given), inputs()
    step(moe, *tokens)  # compiles, which may wait
    no_sync()
    step(moe, *tokens)


@pytest.mark.parametrize("given", [{}, {"capacity": 300, "drop_policy": "slot"}], ids=str)
def test_forward_and_backward_in_one_graph(given):
    moe, tokens = layer(**given), inputs()
    graph, outputs = captured(lambda: step(moe, *tokens))
    for _ in range(3):  # another routing at each replay
        with torch.no_grad():
            for tensor in tokens:
                tensor.normal_()
        graph.replay()
        replayed = [tensor.clone() for tensor in outputs]
        assert all(map(torch.equal, replayed, step(moe, *tokens)))


def test_a_replay_drops_anew():
    moe, tokens = layer(dropout=0.5), inputs()
    graph, outputs = captured(lambda: step(moe, *tokens))
    graph.replay()
    first = outputs[0].clone()
    graph.replay()
    assert not torch.equal(outputs[0], first)


def test_another_stream():
    moe, tokens = layer(), inputs()
    expected = step(moe, *tokens)
    with own_stream(busy=True):
        copies = [tensor.detach().clone().requires_grad_() for tensor in tokens]  # not there before
        result = step(moe, *copies)
    assert all(map(torch.equal, result, expected))


def test_is_that_of_the_cpu():
    moe, tokens = layer(), inputs()
    on_gpu = step(moe, *tokens)
    moe = moe.cpu()
    on_cpu = step(moe, *(tensor.detach().cpu().requires_grad_() for tensor in tokens))
    for here, there in zip(on_gpu, on_cpu, strict=True):
        # Sums of up to 2 T k = 8,000 float32 in two orders: each errs by sqrt(8,000) 2^-24 = 5e-6.
        assert (here.cpu() - there).norm() <= 1e-5 * there.norm()
