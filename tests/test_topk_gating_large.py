"""topk_gating of more rows than a launch has blocks, and of more logits than 2^31."""

import os

import emulator
import numpy as np
import pytest
import torch
from topk_gating_cases import ALL, assert_outputs, differentiable, exact, gradients, separated
from torch.testing import assert_close

from m2ae_kernels import topk_gating


# Rows of a thread, in launches of 1056 blocks at most, and of a warp, 528: more streams than
# blocks, each of more tokens than a block takes at a time.
@pytest.mark.parametrize("S,T,E", [(1100, 130, 3), (530, 9, 33)])
def test_more_rows_than_blocks(S, T, E, impl):
    op, device = impl
    if E > 32 and emulator.shuffled():
        pytest.skip("emulated in two other orders, and shuffled with fewer rows by other tests")
    logits = separated(T, E, device).requires_grad_()
    shift = torch.randint(-9, 9, (S, E), device=device).div(16).requires_grad_()
    actual = op(logits, 2, logit_shift=shift, norm_topk_prob=True, **ALL)
    expected = exact(logits, 2, norm=True, shift=shift)
    assert_outputs(actual, expected)
    upstream = [torch.randn_like(x) for x in differentiable(actual)]
    upstream[3] *= 0  # or the sums over all rows would be all there is to see
    both = [logits, shift]
    of_logits, of_shift = gradients(actual, upstream, both)
    wanted_logits, wanted_shift = gradients(expected, upstream, both)
    # Sums of S terms of about 1: float32 rounds S partial sums of about sqrt(S) to 2^-24 of them,
    # and the roundings add up as their square root, to S / 2^24; and 6 standard deviations.
    assert_close(of_logits, wanted_logits, rtol=1.3e-6, atol=6 * S * 2**-24)
    assert_close(of_shift, wanted_shift)


def available_bytes():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_more_logits_than_2_to_the_31():
    T, E, k = 2_097_252, 1024, 2  # the last 100 rows are behind 2^31 numbers
    if available_bytes() < 8e9:
        pytest.skip("needs 8 GB: the gradient has 4.3")
    # Pages of zeros that are only read take no memory.
    logits = torch.from_numpy(np.zeros((T, E), np.int16)).view(torch.bfloat16)
    logits[-100:] = torch.randn(100, E)
    upstream = torch.randn(100, k)
    last = logits[-100:].clone().requires_grad_()
    logits.requires_grad_()
    weights, ids, lse, _, _, counts = topk_gating(logits, k)
    alone = topk_gating(last, k)
    for x, y in zip((weights, ids, lse), alone[:3], strict=True):
        assert torch.equal(x[-100:], y)
    # Of equal experts, the first.
    assert counts[:2].tolist() == [T - 100 + int(n) for n in alone.tokens_per_expert[:2]]
    assert torch.equal(counts[2:], alone.tokens_per_expert[2:])
    (grad,) = torch.autograd.grad(weights[-100:], logits, upstream)
    assert torch.equal(grad[-100:], torch.autograd.grad(alone.topk_weights, last, upstream)[0])
    assert not grad[:-100:4096].any()
