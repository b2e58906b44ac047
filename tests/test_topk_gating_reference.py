"""The reference of topk_gating: its own gradients, in float64."""

import math

import pytest
import torch
from topk_gating_cases import ALL, SCORES, differentiable, exact
from torch.autograd import gradcheck
from torch.testing import assert_close

from m2ae_kernels import reference, topk_gating

GIVEN = {
    "plain": {},
    "bias": {"expert_bias": torch.tensor([0.5, -0.25, 0.0, 0.75, -1.0, 0.3]).double()},
    "groups": {"n_group": 3, "topk_group": 2},
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("score", SCORES)
def test_reference_gradients(score, given, norm):
    # Logits at a distance of each other, so that no perturbation reorders them.
    logits = torch.stack([torch.randperm(6).double() for _ in range(4)]) / 4
    logits.requires_grad_()
    shift = (torch.randperm(12).double().view(2, 6) / 1000).requires_grad_()
    mask = torch.tensor([True, False, True, True])
    more = {"score_function": score, "norm_topk_prob": norm, "token_mask": mask}

    def outputs(z, shift):
        output = reference.topk_gating(z, 3, logit_shift=shift, **more, **GIVEN[given], **ALL)
        return tuple(x for x in differentiable(output) if x.requires_grad)

    assert gradcheck(outputs, (logits, shift))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_reference_in_float64(score, norm):
    logits = torch.randn(6, 8, dtype=torch.float64) * 4
    bias = torch.randn(8, dtype=torch.float64)
    output = reference.topk_gating(
        logits, 2, score_function=score, norm_topk_prob=norm, expert_bias=bias, **ALL
    )
    expected = exact(logits, 2, score=score, norm=norm, bias=bias)
    for x, y in zip(differentiable(output), differentiable(expected), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("score", SCORES)
def test_reference_of_far_logits_in_float64(score):
    # Around -20 the log-score of sqrtsoftplus goes from one formula to the other.
    logits = torch.linspace(-40, 40, 81, dtype=torch.float64).view(3, 27)
    output = reference.topk_gating(logits, 27, score_function=score)
    expected = exact(logits, 27, score=score).topk_weights
    # exact() takes log1p(exp(z)): good to the last digit for z < 40.
    assert_close(output.topk_weights, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("policy", ["propagate", "zero"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_reference_gradients_of_infinite_and_nan_logits(score, norm, policy):
    inf, nan = math.inf, math.nan
    rows = [[-inf] * 4, [1.0, -inf, -inf, 2.0], [0.0, inf, inf, -inf], [nan, 1.0, -inf, 2.0]]
    rows += [[nan] * 4, [300.0, 0.0, -300.0, 1.0]]
    logits = torch.tensor(rows, requires_grad=True)
    mask = torch.tensor([True] * 6)
    given = {"norm_topk_prob": norm, "token_mask": mask, "nan_policy": policy, **ALL}
    given["score_function"] = score
    grads = []
    for op in (reference.topk_gating, topk_gating):
        output = op(logits, 3, **given)
        loss = output.topk_weights.square()[[0, 1, 3, 4, 5]].sum() + output.entropy.sum()
        loss = loss + output.logsumexp[[1, 3, 5]].sum() + output.probs_sum[0]
        grads.append(torch.autograd.grad(loss, logits)[0])
    assert_close(*grads, equal_nan=True)
    assert grads[0].isnan().any(1).tolist() == [False] * 3 + [policy == "propagate"] * 2 + [False]
