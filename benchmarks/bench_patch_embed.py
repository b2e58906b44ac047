"""patch_embed of uint8 images against what a masked autoencoder does in eager PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from m2ae_kernels import patch_embed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def eager(x, weight, bias, pos_embed, keep_idx, prefix_tokens, *, mean, std):
    """Normalize and embed all patches, then gather those that are kept."""
    mean, std = (torch.tensor(c, device=x.device).view(3, 1, 1) for c in (mean, std))
    x = (x.float() / 255 - mean) / std
    tokens = F.conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).mT + pos_embed
    if keep_idx is not None:
        tokens = tokens.gather(1, keep_idx[..., None].repeat(1, 1, tokens.shape[2]))
    return torch.cat([prefix_tokens.expand(x.shape[0], -1, -1), tokens], dim=1)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("impl", ["eager", "m2ae_kernels"])
@pytest.mark.parametrize("K", [196, 98, 49])
def bench_patch_embed(K, impl, direction, device, bench):
    B, N, D = 4, 196, 384  # ViT-S/16
    x = torch.randint(0, 256, (B, 3, 224, 224), dtype=torch.uint8, device=device)
    shapes = [(D, 3, 16, 16), (D,), (N, D), (1, D)]
    weight, bias, pos, prefix = (
        (0.02 * torch.randn(shape, device=device)).requires_grad_() for shape in shapes
    )
    keep = torch.stack([torch.randperm(N, device=device)[:K] for _ in range(B)])
    keep = None if K == N else keep
    grad = torch.randn(B, 1 + K, D, device=device)
    function = {"eager": eager, "m2ae_kernels": patch_embed}[impl]

    def forward():
        return function(x, weight, bias, pos, keep, prefix, mean=MEAN, std=STD)

    products = {"forward": 1, "forward+backward": 2}[direction]
    bench(
        f"patch_embed {direction} uint8 to float32, B={B} D={D}, {K} of {N} patches",
        forward if direction == "forward" else lambda: forward().backward(grad),
        flops=products * 2 * B * K * D * weight[0].numel(),
        impl=impl,
    )
