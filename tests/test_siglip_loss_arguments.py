"""siglip_loss refuses what it cannot mean, by name."""

import re

import pytest
import torch
from test_siglip_loss import features

from m2ae_kernels import reference, siglip_loss


def zeros(*sizes):
    return torch.zeros(sizes)


def call(op, given):
    arguments = {"image_features": zeros(4, 3), "text_features": zeros(5, 3)}
    return op(**arguments | {"logit_scale": 10.0, "logit_bias": -10.0} | given)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_target_out_of_range_on_the_cpu(wrong):
    images, texts = features(3, 5, D=4)
    for op in (siglip_loss, reference.siglip_loss):
        with pytest.raises(ValueError, match=rf"in \[0, M = 5\) or ignore_index, got {wrong}"):
            op(images, texts, 1.0, 0.0, target=torch.tensor([0, wrong, -100]))


@pytest.mark.parametrize(
    "given,error",
    [
        ({"image_features": zeros(4)}, "expected image_features [N, D], got [4]"),
        ({"text_features": zeros(5, 2)}, "expected text_features [M, D = 3], got [5, 2]"),
        (
            {"text_features": zeros(3, 3)},
            "expected target_offset + N <= M = 3 without a target, got 0 + 4",
        ),
        ({"target_offset": 2}, "expected target_offset + N <= M = 5 without a target, got 2 + 4"),
        ({"target_offset": -1}, "target_offset + N <= M = 5 without a target, got -1 + 4"),
        ({"target": zeros(5).long()}, "expected target [N = 4], got [5]"),
        ({"query_mask": zeros(5).bool()}, "expected query_mask [N = 4], got [5]"),
        ({"key_mask": zeros(4).bool()}, "expected key_mask [M = 5], got [4]"),
        ({"query_ids": zeros(5).long()}, "expected query_ids [N = 4], got [5]"),
        ({"key_ids": zeros(4).long()}, "expected key_ids [M = 5], got [4]"),
        ({"query_ids": zeros(4).long()}, "query_ids and key_ids together, got no key_ids"),
        ({"same_id": "ignore"}, "query_ids and key_ids with same_id='ignore', got none"),
        ({"same_id": "same"}, 'same_id "negative", "ignore" or "positive", got \'same\''),
        ({"weight": zeros(5)}, "expected weight [N = 4], got [5]"),
        ({"weight": zeros(4).requires_grad_()}, "expected weight without requires_grad"),
        ({"eps": 0.0}, "expected eps > 0, got 0.0"),
        ({"reduction": "max"}, 'expected reduction "mean", "sum" or "none", got \'max\''),
        ({"max_workspace_bytes": -1}, "expected max_workspace_bytes >= 0, got -1"),
        ({"logit_scale": zeros(2)}, "expected one number as logit_scale, got shape [2]"),
        ({"logit_bias": zeros(0)}, "expected one number as logit_bias, got shape [0]"),
    ],
)
def test_rejects_values(given, error):
    for op in (siglip_loss, reference.siglip_loss):
        with pytest.raises(ValueError, match=rf"^siglip_loss: .*{re.escape(error)}"):
            call(op, given)


@pytest.mark.parametrize(
    "given,error",
    [
        ({"image_features": zeros(4, 3).int()}, "expected image_features in float32, bfloat16, f"),
        ({"text_features": zeros(5, 3).int()}, "expected text_features in float32, bfloat16, fl"),
        (
            {"text_features": zeros(5, 3).half()},
            "text_features in the dtype of image_features, torch.float32, got torch.float16",
        ),
        ({"target": zeros(4).int()}, "expected target in int64, got torch.int32"),
        ({"query_mask": zeros(4)}, "expected query_mask in bool, got torch.float32"),
        ({"key_mask": zeros(5)}, "expected key_mask in bool, got torch.float32"),
        ({"query_ids": zeros(4)}, "expected query_ids in int64, got torch.float32"),
        ({"key_ids": zeros(5)}, "expected key_ids in int64, got torch.float32"),
        ({"weight": zeros(4).long()}, "expected weight in float32, bfloat16, float16, float64, g"),
        ({"logit_scale": torch.tensor(1)}, "expected logit_scale in float32, bfloat16, float16, f"),
        ({"logit_bias": torch.tensor(1)}, "expected logit_bias in float32, bfloat16, float16, f"),
    ],
)
def test_rejects_types(given, error):
    for op in (siglip_loss, reference.siglip_loss):
        with pytest.raises(TypeError, match=rf"^siglip_loss: .*{re.escape(error)}"):
            call(op, given)


@pytest.mark.parametrize(
    "name,tensor",
    [
        ("text_features", zeros(5, 3)),
        ("logit_scale", zeros(1)),
        ("logit_bias", zeros(1)),
        ("target", zeros(4).long()),
        ("key_mask", zeros(5).bool()),
        ("query_ids", zeros(4).long()),
        ("weight", zeros(4)),
    ],
)
def test_rejects_devices(name, tensor):
    for op in (siglip_loss, reference.siglip_loss):
        with pytest.raises(TypeError, match=rf"^siglip_loss: expected {name} on .*, got meta"):
            call(op, {name: tensor.to("meta")})


def test_float64_is_for_the_reference():
    x = zeros(2, 3).double()
    cure = r"got torch.float64; m2ae_kernels.reference.siglip_loss takes float64"
    for images, texts in ((x, x.float()), (x.float(), x)):
        with pytest.raises(TypeError, match=cure):
            siglip_loss(images, texts, 1.0, 0.0)
    assert reference.siglip_loss(x, x, 1.0, 0.0).dtype == torch.float64
