"""info_nce_loss refuses what it cannot mean, by name."""

import re

import pytest
import torch
from test_info_nce_loss import features

from m2ae_kernels import info_nce_loss, reference


@pytest.mark.parametrize("wrong", [-1, 5])
def test_target_out_of_range_on_the_cpu(wrong):
    query, key = features(3, 5, D=4)
    for op in (info_nce_loss, reference.info_nce_loss):
        with pytest.raises(ValueError, match=rf"in \[0, M = 5\) or ignore_index, got {wrong}"):
            op(query, key, target=torch.tensor([0, wrong, -100]))


@pytest.mark.parametrize(
    "given,error",
    [
        ({"query": (4,)}, "expected query [N, D], got [4]"),
        ({"key": (5, 2)}, "expected key [M, D = 3], got [5, 2]"),
        ({"key": (3, 3)}, "expected target_offset + N <= M = 3 without a target, got 0 + 4"),
        ({"target_offset": 2}, "expected target_offset + N <= M = 5 without a target, got 2 + 4"),
        ({"target_offset": -1}, "target_offset + N <= M = 5 without a target, got -1 + 4"),
        ({"target": torch.zeros(5).long()}, "expected target [N = 4], got [5]"),
        ({"query_mask": torch.ones(5).bool()}, "expected query_mask [N = 4], got [5]"),
        ({"key_mask": torch.ones(4).bool()}, "expected key_mask [M = 5], got [4]"),
        ({"eps": 0.0}, "expected eps > 0, got 0.0"),
        ({"reduction": "max"}, 'expected reduction "mean", "sum" or "none", got \'max\''),
        ({"logit_scale": (2,)}, "expected one number as logit_scale, got shape [2]"),
        ({"logit_bias": (2,)}, "expected one number as logit_bias, got shape [2]"),
    ],
)
def test_rejects_values(given, error):
    given = {"query": (4, 3), "key": (5, 3)} | given
    given = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in given.items()}
    for op in (info_nce_loss, reference.info_nce_loss):
        with pytest.raises(ValueError, match=rf"^info_nce_loss: .*{re.escape(error)}"):
            op(**given)


@pytest.mark.parametrize(
    "given,error",
    [
        ({"query": torch.zeros(4, 3).int()}, "expected query in float32, bfloat16, float16"),
        ({"key": torch.zeros(5, 3).int()}, "expected key in float32, bfloat16, float16"),
        ({"key": torch.zeros(5, 3).half()}, "key in the dtype of query, torch.float32, got torch."),
        ({"target": torch.zeros(4).int()}, "expected target in int64, got torch.int32"),
        ({"query_mask": torch.ones(4)}, "expected query_mask in bool, got torch.float32"),
        ({"key_mask": torch.ones(5)}, "expected key_mask in bool, got torch.float32"),
        ({"logit_scale": torch.tensor(1)}, "expected logit_scale in float32, bfloat16, float16, f"),
        (
            {"key": torch.zeros(5, 3, device="meta")},
            "expected key on the device of query, cpu, got meta",
        ),
        (
            {"logit_scale": torch.ones((), device="meta")},
            "expected logit_scale on the device of query, cpu, got meta",
        ),
        (
            {"key_mask": torch.ones(5, device="meta").bool()},
            "expected key_mask on the device of query, cpu, got meta",
        ),
    ],
)
def test_rejects_types(given, error):
    given = {"query": torch.zeros(4, 3), "key": torch.zeros(5, 3)} | given
    for op in (info_nce_loss, reference.info_nce_loss):
        with pytest.raises(TypeError, match=rf"^info_nce_loss: .*{re.escape(error)}"):
            op(**given)


def test_float64_is_for_the_reference():
    x = torch.zeros(2, 3, dtype=torch.float64)
    cure = r"got torch.float64; m2ae_kernels.reference.info_nce_loss takes float64"
    for query, key in ((x, x.float()), (x.float(), x)):
        with pytest.raises(TypeError, match=cure):
            info_nce_loss(query, key)


@pytest.mark.parametrize(
    "given,error",
    [
        ({"query_ids": torch.zeros(4).long()}, "query_ids=Tensor[4]"),
        ({"key_ids": torch.zeros(5).long()}, "key_ids=Tensor[5]"),
        ({"same_id": "positive"}, "same_id='positive'"),
        ({"exclude_self": True}, "exclude_self=True"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1"),
        ({"weight": torch.ones(4)}, "weight=Tensor[4]"),
        ({"return_metrics": True}, "return_metrics=True"),
        ({"allow_tf32": False}, "allow_tf32=False"),
        ({"max_workspace_bytes": 1024}, "max_workspace_bytes=1024"),
    ],
)
def test_not_supported_yet(given, error):
    for op in (info_nce_loss, reference.info_nce_loss):
        message = re.escape(f"info_nce_loss: {error} is not supported yet")
        with pytest.raises(NotImplementedError, match=message):
            op(torch.zeros(4, 3), torch.zeros(5, 3), **given)
