"""topk_gating refuses what it cannot mean, by name."""

import re

import pytest
import torch

from m2ae_kernels import reference, topk_gating


@pytest.mark.parametrize(
    "shape,k,given,error",
    [
        ((), 1, {}, "expected logits [..., E], got one number"),
        ((4, 3), 0, {}, "expected 1 <= top_k <= E = 3, got 0"),
        ((4, 3), 4, {}, "expected 1 <= top_k <= E = 3, got 4"),
        ((4, 0), 1, {}, "expected 1 <= top_k <= E = 0, got 1"),
        ((4, 1025), 1, {}, "expected E <= 1024 experts, got 1025"),
        ((4, 3), 1, {"score_function": "relu"}, "or \"sqrtsoftplus\", got 'relu'"),
        ((4, 3), 1, {"nan_policy": "raise"}, 'expected nan_policy "propagate" or "zero", got \'ra'),
        ((2, 2, 3), 1, {"token_mask": torch.ones(3).bool()}, "token_mask [T = 4], got [3]"),
        ((4, 3), 1, {"expert_bias": torch.ones(4)}, "expert_bias [E = 3], got [4]"),
        ((4, 3), 1, {"expert_bias": torch.ones(1, 3)}, "expert_bias [E = 3], got [1, 3]"),
        ((4, 3), 1, {"logit_shift": torch.ones(3)}, "logit_shift [S, E = 3], got [3]"),
        ((4, 3), 1, {"logit_shift": torch.ones(2, 4)}, "logit_shift [S, E = 3], got [2, 4]"),
        ((4, 6), 1, {"n_group": 4}, "expected n_group to divide E = 6, got 4"),
        ((4, 6), 1, {"n_group": 0}, "expected n_group to divide E = 6, got 0"),
        ((4, 6), 1, {"topk_group": 2}, "expected 1 <= topk_group <= n_group = 1, got 2"),
        ((4, 6), 1, {"topk_group": 0}, "expected 1 <= topk_group <= n_group = 1, got 0"),
        ((4, 6), 5, {"n_group": 3, "topk_group": 2}, "topk_group * E / n_group = 2 * 6 / 3 = 4, g"),
        ((4, 6), 1, {"group_score": "mean"}, '"max", "top2_sum" or a number >= 1, got \'mean\''),
        ((4, 6), 1, {"group_score": 0}, '"max", "top2_sum" or a number >= 1, got 0'),
        (
            (4, 6),
            1,
            {"n_group": 2, "group_score": 4},
            "the E / n_group = 3 experts of a group, got 4",
        ),
        ((4, 6), 1, {"n_group": 6}, "experts of a group, got 'top2_sum'; \"max\" suits any group"),
    ],
)
def test_rejects_values(shape, k, given, error):
    for op in (topk_gating, reference.topk_gating):
        with pytest.raises(ValueError, match=rf"^topk_gating: .*{re.escape(error)}"):
            op(torch.zeros(shape), k, **given)


def test_rejects_types():
    with pytest.raises(
        TypeError, match=r"logits in float32, bfloat16, float16, got torch.float64;"
    ):
        topk_gating(torch.zeros(4, 3, dtype=torch.float64), 1)
    for op in (topk_gating, reference.topk_gating):
        with pytest.raises(TypeError, match=r"topk_gating: expected logits in .*, got torch.int64"):
            op(torch.zeros(4, 3, dtype=torch.int64), 1)
        with pytest.raises(TypeError, match=r"topk_gating: expected token_mask in bool, got torch"):
            op(torch.zeros(4, 3), 1, token_mask=torch.ones(4))
        with pytest.raises(TypeError, match=r"token_mask on the device of logits, cpu, got meta"):
            op(torch.zeros(4, 3), 1, token_mask=torch.ones(4, device="meta").bool())
        with pytest.raises(TypeError, match=r"expected expert_bias in float32, got torch.bfloat16"):
            op(torch.zeros(4, 3), 1, expert_bias=torch.zeros(3, dtype=torch.bfloat16))
        with pytest.raises(TypeError, match=r"expert_bias on the device of logits, cpu, got meta"):
            op(torch.zeros(4, 3), 1, expert_bias=torch.zeros(3, device="meta"))
        with pytest.raises(
            TypeError, match=r"logit_shift in float32, bfloat16, float16, got torch"
        ):
            op(torch.zeros(4, 3), 1, logit_shift=torch.zeros(2, 3, dtype=torch.float64))
        with pytest.raises(TypeError, match=r"logit_shift on the device of logits, cpu, got meta"):
            op(torch.zeros(4, 3), 1, logit_shift=torch.zeros(2, 3, device="meta"))
