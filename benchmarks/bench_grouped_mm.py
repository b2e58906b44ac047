"""grouped_mm with bias and GELU against torch's grouped_mm and a loop, with both after them."""

import pytest
import torch
from torch.nn import functional as F

from m2ae_kernels import grouped_mm


def eager(a, b, offs, bias):
    begin, parts = 0, []
    for e, end in enumerate(offs.tolist()):
        parts.append(F.gelu(torch.addmm(bias[e], a[begin:end], b[e])))
        begin = end
    return torch.cat(parts)


def torch_grouped_mm(a, b, offs, bias):
    sizes = F.pad(offs, (1, 0)).diff()
    return F.gelu(F.grouped_mm(a, b, offs=offs) + bias.repeat_interleave(sizes, 0))


def ours(a, b, offs, bias):
    return grouped_mm(a, b, offs=offs, bias=bias, activation="gelu")


IMPLS = {"eager loop": eager, "F.grouped_mm": torch_grouped_mm, "m2ae_kernels": ours}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("M,K,C,E", [(2048, 256, 512, 12)])
def bench_grouped_mm(M, K, C, E, impl, direction, device, bench):
    a = torch.randn(M, K, device=device, requires_grad=True)
    b = torch.randn(E, K, C, device=device, requires_grad=True)
    bias = torch.randn(E, C, device=device, requires_grad=True)
    offs = torch.linspace(0, M, E + 1, device=device).to(torch.int32)[1:]
    grad = torch.randn(M, C, device=device)

    def forward():
        return IMPLS[impl](a, b, offs, bias)

    def both():
        return torch.autograd.grad(forward(), (a, b, bias), grad)

    passes = 1 if direction == "forward" else 3
    bench(
        f"grouped_mm {direction} M={M} K={K} C={C} E={E}",
        forward if direction == "forward" else both,
        flops=passes * 2 * M * K * C,
        impl=impl,
    )
