"""info_nce_loss: long sums, small shares, small numbers; nothing is lost for being little."""

import math

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import EPS, HALVES, exact, features, number
from interpreter import skip_if_interpreted
from torch.testing import assert_close

from m2ae_kernels._library import served_by

MANY = 65_536
HOW_MANY = "and what is tested is the number of tiles, 65,536 rows"


@pytest.mark.parametrize("many", ["keys", "queries"])
def test_long_sums_of_equal_terms(many, impl):
    skip_if_interpreted(HOW_MANY)
    op, device = impl
    # 65,535 equal terms, one after the other in float32, would be off by up to 65,535 / 2 EPS.
    N, M = (16, MANY) if many == "keys" else (MANY, 16)
    query, key = (torch.full((size, 1), 0.3, device=device) for size in (N, M))
    target = torch.arange(N, device=device) % 16
    loss_q, loss_k = op(query, key, 100.0, target=target, reduction="none")
    assert_close(loss_q, torch.full_like(loss_q, math.log(M)), rtol=4 * EPS, atol=0)
    share = math.log(N)  # of a key: the mean over its queries, each of 1 / N
    assert_close(loss_k[:16], torch.full_like(loss_k[:16], share), rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_negatives_of_a_long_queue_stay_alive(dtype, impl):
    skip_if_interpreted(HOW_MANY)
    op, device = impl
    # Every key but 32 is only a negative, with a probability of about 1.5e-5 of each query, which
    # a kernel that leaves out small ones, or float16 without a common factor, makes nothing of.
    query, key = features(32, MANY, D=8, device=device, dtype=dtype)
    x, y = (t.detach().double().requires_grad_() for t in (query, key))
    for symmetric in (False, True):
        loss = op(query, key, 5.0, symmetric=symmetric)
        expected = exact(x, y, 5.0, symmetric=symmetric)
        assert_close(loss.double(), expected, rtol=1.3e-6, atol=0)
        factor = 2.0**16  # GradScaler's first; without it they are no float16 as they come out
        (grad,) = torch.autograd.grad(loss * factor, key)
        (wanted,) = torch.autograd.grad(expected, y)
        grad, wanted = grad[32:].double() / factor, wanted[32:]
        near = HALVES[dtype] * 2 + 32 * EPS
        # The smallest of them times 2^16 / 32 are 1e-3 or so; float16 rounds that to 3e-8.
        assert (grad - wanted).norm() <= near * wanted.norm()
        assert (grad.norm(dim=1) > wanted.norm(dim=1) / 2).all()


@pytest.mark.slow
def test_negatives_of_65536_pairs_stay_alive(request, impl):
    kernel = request.node.callspec.params["impl"]
    if kernel == "reference":
        pytest.skip("holds N x N: 17 GB, several times")
    skip_if_interpreted(HOW_MANY)
    op, device = impl
    # Rather than take the machine's memory: the CPU has a kernel for this.
    assert kernel != "registered" or not served_by("info_nce_loss", "cpu").startswith("reference")
    # 64 different queries and keys, 1024 times each: a matrix of more than 2^31 entries, whose sums
    # are 1024 times those of 64 x 64 in float64. Of the copies of its key, one is a query's pair.
    repeats, D = MANY // 64, 8
    small = [F.normalize(z.detach()) for z in features(64, 64, D=D, device=device)]
    query, key = (z.repeat(repeats, 1).requires_grad_() for z in small)
    scale = number(14.3, device)
    x, y = (z.double().requires_grad_() for z in small)
    s = scale.detach().double().requires_grad_()
    logits = s * x @ y.mT
    pair = logits.diag()
    once = torch.eye(64, dtype=torch.float64, device=device)
    sums = [(z.exp() * (repeats - once)).sum(1) for z in (logits, logits.mT)]
    expected = sum(torch.log1p(total / pair.exp()).mean() for total in sums) / 2
    loss = op(query, key, scale)
    assert_close(loss.double(), expected.detach(), rtol=1.3e-6, atol=0)
    grads = torch.autograd.grad(loss, (query, key, scale))
    wanted = torch.autograd.grad(expected, (x, y, s))
    for grad, right in zip(grads[:2], wanted[:2], strict=True):
        copies = grad.double().view(repeats, 64, D)
        # Each copy has 1/1024 of the gradient; 32 EPS as a logit of 14 is rounded by 14 EPS.
        error = (copies * repeats - right).norm(dim=(1, 2)) / right.norm()
        assert error.max() <= 64 * EPS
    assert_close(grads[2].double(), wanted[2], rtol=64 * EPS, atol=0)
    # Without the pair's own term: what the negatives alone pull with. Of it nothing may vanish.
    pull = grads[0].double() * MANY
    of_pair = 14.3 * (torch.sigmoid((sums[0] / pair.exp()).log())).detach()
    of_pair = of_pair + 14.3 * (torch.sigmoid((sums[1] / pair.exp()).log())).detach()
    negatives = pull[:64] + (of_pair / 2)[:, None] * y.detach()
    share_q = (logits - (sums[0] + pair.exp()).log()[:, None]).exp()
    share_k = (logits - (sums[1] + pair.exp()).log()).exp()
    exactly = 14.3 / 2 * ((share_q + share_k) * (repeats - once)) @ y
    assert_close(negatives.norm(), exactly.norm().detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["query", "key"])
def test_accumulation_over_chunks(side, dtype, impl):
    skip_if_interpreted("and there are no chunks in a small matrix")
    op, device = impl
    # Accumulated in bfloat16, 16 chunks are off by 0.5 %, 64 by 1 %.
    query, key = features(1500, 1300, D=16, device=device, dtype=dtype)
    target = torch.randint(0, 1300, (1500,), device=device)
    x, y = (t.detach().double().requires_grad_() for t in (query, key))
    expected = exact(x, y, target=target)
    which = (query, x) if side == "query" else (key, y)
    (wanted,) = torch.autograd.grad(expected, which[1])
    for chunks in (1, 4, 16, 64):
        workspace = 1500 * 1300 * dtype.itemsize // chunks
        loss = op(query, key, target=target, max_workspace_bytes=workspace)
        (grad,) = torch.autograd.grad(loss, which[0])
        error = (grad.double() - wanted).norm() / wanted.norm()
        # Logits up to about 40 in float32; 16 bits twice, of which the sums keep less than half.
        assert error <= 80 * EPS + HALVES[dtype]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_grad_scaler_keeps_float16_from_0(reduction, normalize, impl):
    skip_if_interpreted("and the shares are small only among many")
    op, device = impl
    query, key = features(500, 500, D=16, device=device, dtype=torch.float16)
    scale = number(14.3, device)
    x, y = (t.detach().double().requires_grad_() for t in (query, key))
    loss = op(query, key, scale, normalize=normalize, reduction=reduction)
    expected = exact(x, y, 14.3, normalize=normalize, reduction="mean")
    loss = loss if reduction == "mean" else sum(side.mean() for side in loss) / 2
    factor = 2.0**16
    grads = torch.autograd.grad(loss * factor, (query, key, scale))
    for grad, right in zip(grads[:2], torch.autograd.grad(expected, (x, y)), strict=True):
        assert grad.isfinite().all()
        assert (grad.double() / factor - right).norm() <= 3 * HALVES[torch.float16] * right.norm()


def test_grad_scaler_factor_of_any_size(impl):
    op, device = impl
    query, key = features(20, 24, D=16, device=device, dtype=torch.float16)
    x, y = (t.detach().double().requires_grad_() for t in (query, key))
    right = torch.autograd.grad(exact(x, y, 9.0), (x, y))
    loss = op(query, key, 9.0)
    for factor in (1.0, 2.0**10, -(2.0**12)):
        grads = torch.autograd.grad(loss * factor, (query, key), retain_graph=True)
        for grad, wanted in zip(grads, right, strict=True):
            error = (grad.double() / factor - wanted).norm()
            assert error <= 3 * HALVES[torch.float16] * wanted.norm()
    # Too large a factor gives inf, never NaN in what autograd scales: GradScaler then skips.
    huge = torch.autograd.grad(loss * 2.0**40, (query, key))
    assert all(grad.isinf().any() and not grad.isnan().any() for grad in huge)
