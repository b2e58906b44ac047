"""info_nce_loss against the CLIP loss of two cross entropies in eager PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from m2ae_kernels import info_nce_loss


def eager(query, key, scale):
    query, key = F.normalize(query), F.normalize(key)
    logits = scale * query @ key.mT
    target = torch.arange(len(query), device=query.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2


def ours(query, key, scale):
    return info_nce_loss(query, key, scale, normalize=True)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("impl", ["eager", "m2ae_kernels"])
@pytest.mark.parametrize("N,D", [(64, 128), (512, 256), (1024, 256)])
def bench_info_nce_loss(N, D, impl, direction, device, bench):
    query, key = (torch.randn(N, D, device=device, requires_grad=True) for _ in range(2))
    scale = torch.tensor(1 / 0.07, device=device, requires_grad=True)
    function = {"eager": eager, "m2ae_kernels": ours}[impl]

    def forward():
        return function(query, key, scale)

    products = {"forward": 1, "forward+backward": 3}[direction]  # of the eager one
    bench(
        f"info_nce_loss {direction} N={N} D={D}",
        forward if direction == "forward" else lambda: forward().backward(),
        flops=products * 2 * N * N * D,
        impl=impl,
    )
