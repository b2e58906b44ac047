"""topk_gating: logits that are infinite or NaN, and tokens that are masked."""

import math

import pytest
import torch
from topk_gating_cases import ALL, assert_outputs, differentiable, exact
from torch.testing import assert_close

from m2ae_kernels import TopkGatingOutput


@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_infinite_logits(policy, impl):
    op, device = impl
    inf = math.inf
    logits = torch.tensor(
        [
            [1.0, -inf, 2.0, -inf, 0.0],  # fewer finite than k
            [-inf, -inf, 3.0, -inf, -inf],
            [-inf, -inf, -inf, -inf, -inf],
            [0.0, inf, 1.0, inf, -inf],
            [1e30, -1e30, 1e30, 1e30, 1e-42],
        ],
        device=device,
        requires_grad=True,
    )
    output = op(logits, 4, nan_policy=policy, **ALL)
    assert output.topk_ids.tolist() == [
        [2, 0, 4, 1],
        [2, 0, 1, 3],
        [0, 1, 2, 3],
        [1, 3, 2, 0],
        [0, 2, 3, 4],
    ]
    e = [math.exp(-i) for i in range(3)]
    weights = [
        [e[0] / sum(e), e[1] / sum(e), e[2] / sum(e), 0.0],
        [1.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [0.5, 0.5, 0.0, 0.0],
        [1 / 3, 1 / 3, 1 / 3, 0.0],
    ]
    assert_close(output.topk_weights, torch.tensor(weights, device=device))
    lse = torch.tensor([2 + math.log(sum(e)), 3.0, -inf, inf, 1e30], device=device)
    assert_close(output.logsumexp, lse)
    entropy = [
        sum(-x / sum(e) * math.log(x / sum(e)) for x in e),
        0.0,
        0.0,
        math.log(2),
        math.log(3),
    ]
    assert_close(output.entropy, torch.tensor(entropy, device=device))
    assert_close(output.probs_sum.sum(), torch.tensor(4.0, device=device))
    normed = op(logits, 4, norm_topk_prob=True, nan_policy=policy)
    assert_close(normed.topk_weights, torch.tensor(weights, device=device))
    # A loss that is infinite or NaN in rows 2 and 3 has no gradient there, and hurts no other.
    loss = output.topk_weights.square().sum() + output.logsumexp.square().sum()
    (loss + output.entropy.sum() + output.probs_sum.square().sum()).backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[2:4].any()
    assert not logits.grad[0, [1, 3]].any()


def test_nan_ranks_last_and_follows_its_policy(impl):
    op, device = impl
    inf, nan = math.inf, math.nan
    rows = [[1.0, nan, 2.0, -inf, 3.0], [nan] * 5, [nan, 0.0, nan, nan, -inf], [4, 3, 2, 1, 0]]
    logits = torch.tensor(rows, device=device, requires_grad=True)
    ids = [[4, 2, 0, 3], [0, 1, 2, 3], [1, 4, 0, 2], [0, 1, 2, 3]]
    for norm in (False, True):
        output = op(logits, 4, norm_topk_prob=norm, **ALL)
        assert output.topk_ids.tolist() == ids
        assert output.topk_weights[:3].isnan().all()
        assert output.logsumexp[:3].isnan().all()
        assert output.entropy[:3].isnan().all()
        assert output.probs_sum.isnan().all()
        clean = op(logits[3:], 4, norm_topk_prob=norm, **ALL)
        assert torch.equal(output.topk_weights[3:], clean.topk_weights)
        (grad,) = torch.autograd.grad(output.topk_weights.square().sum(), logits)
        assert grad[:3].isnan().all()
        assert grad[3].isfinite().all()

        output = op(logits, 4, norm_topk_prob=norm, nan_policy="zero", **ALL)
        without = logits.detach().masked_fill(logits.isnan(), -inf).requires_grad_()
        expected = op(without, 4, norm_topk_prob=norm, **ALL)
        assert output.topk_ids.tolist() == ids
        for x, y in zip(differentiable(output), differentiable(expected), strict=True):
            assert torch.equal(x, y)
        assert not output.topk_weights[1].any()
        (grad,) = torch.autograd.grad(output.topk_weights.square().sum(), logits)
        (wanted,) = torch.autograd.grad(expected.topk_weights.square().sum(), without)
        assert torch.equal(grad, wanted)
        assert grad.isfinite().all()


def test_masked_tokens(impl):
    op, device = impl
    logits = torch.randn(12, 6, device=device)
    mask = torch.rand(12, device=device) < 0.5
    mask[0], mask[1] = True, False
    logits[~mask] = math.nan
    logits.requires_grad_()
    for policy in ("propagate", "zero"):
        output = op(logits, 3, token_mask=mask, nan_policy=policy, **ALL)
        expected = exact(logits[mask], 3)
        assert (output.topk_ids[~mask] == -1).all()
        assert not output.topk_weights[~mask].any()
        assert not output.logsumexp[~mask].any()
        assert not output.entropy[~mask].any()
        rows = (output.topk_weights[mask], output.topk_ids[mask], output.logsumexp[mask])
        rest = (output.entropy[mask], output.probs_sum, output.tokens_per_expert)
        assert_outputs(TopkGatingOutput(*rows, *rest), expected)
        upstream = [torch.randn_like(x) for x in differentiable(output)]
        (grad,) = torch.autograd.grad(differentiable(output), logits, upstream)
        upstream = [g.double() if i == 3 else g[mask].double() for i, g in enumerate(upstream)]
        (wanted,) = torch.autograd.grad(differentiable(expected), logits, upstream)
        assert not grad[~mask].any()
        assert_close(grad[mask], wanted[mask])
    nobody = op(logits, 3, token_mask=torch.zeros_like(mask), **ALL)
    assert not nobody.tokens_per_expert.any()
    assert not nobody.probs_sum.any()
