"""siglip_loss against the sigmoid loss in eager PyTorch, compiled, and in siglip-kernel.

How to run it as a program: contrastive.py
"""

import importlib.util
import shutil

import pytest
import torch
import torch.nn.functional as F
from contrastive import DIMS, DIRECTIONS, OURS, SHAPES, Program, call

from m2ae_kernels import siglip_loss

NUMBERS = (10.0, -10.0)  # scale and bias, as SigLIP begins
ROWS = ["eager", "eager_shared_logits", "siglip_kernel", OURS]


def eager(images, texts, scale, bias):
    """As open_clip writes it: a matrix of labels, and logits times labels."""
    images, texts = F.normalize(images), F.normalize(texts)
    logits = scale * images @ texts.mT + bias
    labels = 2 * torch.eye(len(images), device=images.device, dtype=images.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(images)


def eager_shared_logits(images, texts, scale, bias):
    """The best form by hand: every entry as a negative, and softplus(-l) = softplus(l) - l."""
    images, texts = F.normalize(images), F.normalize(texts)
    logits = scale * images @ texts.mT + bias
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(images)


def ours(images, texts, scale, bias):
    return siglip_loss(images, texts, scale, bias, normalize=True)


def siglip_kernel(images, texts, scale, bias):
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(F.normalize(images), F.normalize(texts), scale.log(), bias)


def rows_on(device):
    """The implementations that can run here, by name."""
    rows = {"eager": eager, "eager_shared_logits": eager_shared_logits}
    if device == "cuda" or shutil.which("c++") is not None:
        rows["compile"] = torch.compile(eager_shared_logits, dynamic=False)
    if device == "cuda" and importlib.util.find_spec("siglip_kernel") is not None:
        rows["siglip_kernel"] = siglip_kernel
    return rows | {OURS: ours}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", range(3))
def bench_siglip_loss(size, dtype, impl, direction, device, bench):
    """One shape of each size; the table over all shapes is what this file prints as a program."""
    N, D = SHAPES[device][size], DIMS[size % 2]
    function = rows_on(device).get(impl)
    if function is None:
        pytest.skip(f"{impl} is not installed, or does not run on {device}")
    if device == "cpu" and size > 0:
        pytest.skip("takes seconds per call: python benchmarks/bench_siglip_loss.py")
    if device == "cuda" and (size, impl) in ((2, "eager"), (2, "eager_shared_logits")):
        pytest.skip("takes 50 GB or more")
    bench(
        f"siglip_loss {direction} N={N} D={D} {dtype}",
        call(function, NUMBERS, N, D, dtype, direction, device),
        flops=DIRECTIONS[direction] * 2 * N * N * D,
        impl=impl,
    )


if __name__ == "__main__":
    Program(rows_on, NUMBERS).main()
