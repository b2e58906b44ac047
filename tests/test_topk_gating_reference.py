"""The reference of topk_gating: its own gradients, in float64."""

import math

import pytest
import torch
from test_topk_gating import ALL, differentiable, exact
from torch.autograd import gradcheck
from torch.testing import assert_close

from m2ae_kernels import reference, topk_gating


def test_reference_gradients():
    # Logits at a distance of each other, so that no perturbation reorders them.
    logits = torch.stack([torch.randperm(5).double() for _ in range(4)]) / 4
    logits.requires_grad_()
    mask = torch.tensor([True, False, True, True])
    for norm in (False, True):

        def outputs(z, norm=norm):
            return tuple(
                differentiable(
                    reference.topk_gating(z, 3, norm_topk_prob=norm, token_mask=mask, **ALL)
                )
            )

        assert gradcheck(outputs, logits)


def test_reference_in_float64():
    logits = torch.randn(6, 5, dtype=torch.float64)
    output = reference.topk_gating(logits, 2, **ALL)
    for x, y in zip(differentiable(output), differentiable(exact(logits, 2)), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("policy", ["propagate", "zero"])
@pytest.mark.parametrize("norm", [False, True])
def test_reference_gradients_of_infinite_and_nan_logits(norm, policy):
    inf, nan = math.inf, math.nan
    rows = [[-inf] * 4, [1.0, -inf, -inf, 2.0], [0.0, inf, inf, -inf], [nan, 1.0, -inf, 2.0]]
    rows += [[nan] * 4, [300.0, 0.0, -300.0, 1.0]]
    logits = torch.tensor(rows, requires_grad=True)
    mask = torch.tensor([True] * 6)
    given = {"norm_topk_prob": norm, "token_mask": mask, "nan_policy": policy, **ALL}
    grads = []
    for op in (reference.topk_gating, topk_gating):
        output = op(logits, 3, **given)
        loss = output.topk_weights.square().sum() + output.entropy.sum()
        loss = loss + output.logsumexp[[1, 3, 5]].sum() + output.probs_sum[0]
        grads.append(torch.autograd.grad(loss, logits)[0])
    assert_close(*grads, equal_nan=True)
    assert grads[0].isnan().any(1).tolist() == [False] * 3 + [policy == "propagate"] * 2 + [False]
