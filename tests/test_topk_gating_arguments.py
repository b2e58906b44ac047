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


@pytest.mark.parametrize(
    "given,error",
    [
        ({"score_function": "sigmoid"}, "score_function='sigmoid'"),
        ({"score_function": "sqrtsoftplus"}, "score_function='sqrtsoftplus'"),
        ({"expert_bias": torch.zeros(4)}, "expert_bias=Tensor[4]"),
        ({"n_group": 2}, "n_group=2"),
        ({"topk_group": 2}, "topk_group=2"),
        ({"group_score": "max"}, "group_score='max'"),
        ({"logit_shift": torch.zeros(2, 4)}, "logit_shift=Tensor[2, 4]"),
    ],
)
def test_not_supported_yet(given, error):
    for op in (topk_gating, reference.topk_gating):
        message = re.escape(f"topk_gating: {error} is not supported yet")
        with pytest.raises(NotImplementedError, match=message):
            op(torch.zeros(4, 4), 2, **given)
