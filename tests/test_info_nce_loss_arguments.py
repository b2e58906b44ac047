"""info_nce_loss refuses what it cannot mean, by name."""

import re

import pytest
import torch

from m2ae_kernels import info_nce_loss, reference

BOTH = [info_nce_loss, reference.info_nce_loss]
IDS = {"query_ids": torch.zeros(4).long(), "key_ids": torch.zeros(5).long()}


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_target_out_of_range_on_the_cpu(wrong):
    for op in BOTH:
        with pytest.raises(ValueError, match=rf"in \[0, M = 5\) or ignore_index, got {wrong}$"):
            op(torch.zeros(3, 4), torch.zeros(5, 4), target=torch.tensor([0, wrong, -100]))
        target = torch.tensor([0, wrong, 4])
        op(torch.zeros(3, 4), torch.zeros(5, 4), target=target, ignore_index=wrong)
        with pytest.raises(ValueError, match=r"in \[0, M = 0\) or ignore_index, got 0$"):
            op(torch.zeros(3, 4), torch.zeros(0, 4), target=torch.zeros(3).long())


VALUES = [
    ({"query": (4,)}, "expected query [N, D], got [4]"),
    ({"query": (4, 3, 2)}, "expected query [N, D], got [4, 3, 2]"),
    ({"key": (5, 2)}, "expected key [M, D = 3], got [5, 2]"),
    ({"key": (3,)}, "expected key [M, D = 3], got [3]"),
    ({"key": (3, 3)}, "expected target_offset + N <= M = 3 without a target, got 0 + 4"),
    ({"target_offset": 2}, "expected target_offset + N <= M = 5 without a target, got 2 + 4"),
    ({"target_offset": -1}, "target_offset + N <= M = 5 without a target, got -1 + 4"),
    (
        {"target_offset": 2, "exclude_self": True, "target": torch.zeros(4).long()},
        "expected target_offset + N <= M = 5 with exclude_self, got 2 + 4",
    ),
    ({"target": torch.zeros(5).long()}, "expected target [N = 4], got [5]"),
    ({"target": torch.zeros(4, 1).long()}, "expected target [N = 4], got [4, 1]"),
    ({"query_mask": torch.ones(5).bool()}, "expected query_mask [N = 4], got [5]"),
    ({"key_mask": torch.ones(4).bool()}, "expected key_mask [M = 5], got [4]"),
    ({"query_ids": torch.zeros(5).long()}, "expected query_ids [N = 4], got [5]"),
    ({"key_ids": torch.zeros(4).long()}, "expected key_ids [M = 5], got [4]"),
    ({"weight": torch.ones(5)}, "expected weight [N = 4], got [5]"),
    ({"weight": torch.ones(())}, "expected weight [N = 4], got []"),
    (
        {"same_id": "drop", **IDS},
        'expected same_id "negative", "ignore" or "positive", got \'drop\'',
    ),
    ({"same_id": None, **IDS}, 'expected same_id "negative", "ignore" or "positive", got None'),
    (
        {"query_ids": IDS["query_ids"]},
        "expected query_ids and key_ids together, got no key_ids",
    ),
    (
        {"key_ids": IDS["key_ids"], "same_id": "ignore"},
        "expected query_ids and key_ids together, got no query_ids",
    ),
    ({"same_id": "ignore"}, "expected query_ids and key_ids with same_id='ignore', got none"),
    ({"same_id": "positive"}, "expected query_ids and key_ids with same_id='positive', got none"),
    ({"eps": 0.0}, "expected eps > 0, got 0.0"),
    ({"eps": -1e-3}, "expected eps > 0, got -0.001"),
    ({"eps": float("nan")}, "expected eps > 0, got nan"),
    ({"label_smoothing": 1.0}, "expected label_smoothing in [0, 1), got 1.0"),
    ({"label_smoothing": -0.1}, "expected label_smoothing in [0, 1), got -0.1"),
    ({"label_smoothing": float("nan")}, "expected label_smoothing in [0, 1), got nan"),
    ({"reduction": "max"}, 'expected reduction "mean", "sum" or "none", got \'max\''),
    ({"max_workspace_bytes": -1}, "expected max_workspace_bytes >= 0, got -1"),
    ({"logit_scale": (2,)}, "expected one number as logit_scale, got shape [2]"),
    ({"logit_scale": (0,)}, "expected one number as logit_scale, got shape [0]"),
    ({"logit_bias": (2,)}, "expected one number as logit_bias, got shape [2]"),
]


@pytest.mark.parametrize("given,error", VALUES)
def test_rejects_values(given, error):
    given = {"query": (4, 3), "key": (5, 3)} | given
    given = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in given.items()}
    for op in BOTH:
        with pytest.raises(ValueError, match=rf"^info_nce_loss: .*{re.escape(error)}$"):
            op(**given)


FLOATS = "float32, bfloat16, float16"
META = {
    "target": (torch.zeros(4, device="meta").long(), "the features"),
    "query_mask": (torch.zeros(4, device="meta").bool(), "the features"),
    "key_mask": (torch.zeros(5, device="meta").bool(), "the features"),
    "weight": (torch.zeros(4, device="meta"), "the features"),
    "logit_scale": (torch.zeros((), device="meta"), "the features"),
    "logit_bias": (torch.zeros((), device="meta"), "the features"),
    "key": (torch.zeros(5, 3, device="meta"), "query"),
}
TYPES = [
    ({"query": torch.zeros(4, 3).int()}, f"expected query in {FLOATS}"),
    ({"key": torch.zeros(5, 3).int()}, f"expected key in {FLOATS}"),
    ({"key": torch.zeros(5, 3).half()}, "key in the dtype of query, torch.float32, got torch.fl"),
    ({"query": torch.zeros(4, 3).to(torch.complex64)}, "got torch.complex64"),
    ({"target": torch.zeros(4).int()}, "expected target in int64, got torch.int32"),
    ({"query_mask": torch.ones(4)}, "expected query_mask in bool, got torch.float32"),
    ({"key_mask": torch.ones(5).int()}, "expected key_mask in bool, got torch.int32"),
    ({**IDS, "query_ids": torch.zeros(4)}, "expected query_ids in int64, got torch.float32"),
    ({**IDS, "key_ids": torch.zeros(5).int()}, "expected key_ids in int64, got torch.int32"),
    ({"weight": torch.ones(4).int()}, f"expected weight in {FLOATS}, float64, got torch.int32"),
    ({"logit_scale": torch.tensor(1)}, f"expected logit_scale in {FLOATS}, float64, got torch.int"),
    ({"logit_bias": torch.tensor(1)}, f"expected logit_bias in {FLOATS}, float64, got torch.int"),
]
TYPES += [
    ({name: tensor}, f"expected {name} on the device of {of}, cpu, got meta")
    for name, (tensor, of) in META.items()
]


@pytest.mark.parametrize("given,error", TYPES)
def test_rejects_types(given, error):
    given = {"query": torch.zeros(4, 3), "key": torch.zeros(5, 3)} | given
    for op in BOTH:
        with pytest.raises(TypeError, match=rf"^info_nce_loss: .*{re.escape(error)}"):
            op(**given)


def test_float64_is_for_the_reference():
    x = torch.zeros(2, 3, dtype=torch.float64)
    cure = r"got torch.float64; m2ae_kernels.reference.info_nce_loss takes float64$"
    for query, key in ((x, x.float()), (x.float(), x)):
        with pytest.raises(TypeError, match=cure):
            info_nce_loss(query, key)
    assert reference.info_nce_loss(x, x).dtype == torch.float64


def test_takes_what_changes_nothing_on_the_cpu():
    query, key = torch.randn(4, 3), torch.randn(5, 3)
    expected = info_nce_loss(query, key)
    for given in ({"allow_tf32": True}, {"allow_tf32": False}, {"max_workspace_bytes": 0}):
        assert torch.equal(info_nce_loss(query, key, **given), expected)
