"""topk_gating against the softmax, topk and sums of eager PyTorch."""

import pytest
import torch

from m2ae_kernels import topk_gating


def eager(logits, k):
    """Weights, ids, and what the balance and z losses need."""
    probs = logits.softmax(-1)
    weights, ids = probs.topk(k, dim=-1)
    count = torch.bincount(ids.flatten(), minlength=logits.shape[1])
    return weights, ids, logits.logsumexp(-1), probs.sum(0), count


def ours(logits, k):
    output = topk_gating(logits, k, return_probs_sum=True)
    return (
        output.topk_weights,
        output.topk_ids,
        output.logsumexp,
        output.probs_sum,
        output.tokens_per_expert,
    )


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("impl", ["eager", "m2ae_kernels"])
@pytest.mark.parametrize("T,E,k", [(4096, 12, 4), (4096, 64, 8)])
def bench_topk_gating(T, E, k, impl, direction, device, bench):
    logits = torch.randn(T, E, device=device, requires_grad=True)
    function = {"eager": eager, "m2ae_kernels": ours}[impl]
    grads = [torch.randn(shape, device=device) for shape in ((T, k), (T,), (E,))]

    def forward():
        return function(logits, k)

    def both():
        weights, _, logsumexp, probs_sum, _ = forward()
        torch.autograd.backward([weights, logsumexp, probs_sum], grads)

    forth = 4 * (T * E + 2 * T * k + T)
    back = 4 * (2 * T * E + 2 * T * k)
    bench(
        f"topk_gating {direction} T={T} E={E} k={k}",
        forward if direction == "forward" else both,
        bytes_moved=forth if direction == "forward" else forth + back,
        impl=impl,
    )
