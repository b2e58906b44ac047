"""moe_sort refuses what it cannot mean, by name."""

import re

import pytest
import torch

from m2ae_kernels import moe_sort, reference

IDS = torch.zeros(4, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    "ids,E,given,error",
    [
        (IDS[0], 3, {}, "expected topk_ids [R, k] with k >= 1, got [2]"),
        (IDS[:, :0], 3, {}, "expected topk_ids [R, k] with k >= 1, got [4, 0]"),
        (IDS, 0, {}, "expected num_experts >= 1, got 0"),
        (IDS, 3, {"align": 0}, "expected align >= 1, got 0"),
        (IDS, 3, {"capacity": -1}, "expected capacity >= 0 or None, got -1"),
        (IDS, 3, {"drop_policy": "last"}, '"position", "slot" or "prob", got \'last\''),
        (
            IDS,
            3,
            {"drop_policy": "prob", "capacity": 1},
            'expected topk_weights for drop_policy "prob", got None',
        ),
        (
            IDS,
            3,
            {"topk_weights": torch.ones(4, 3)},
            "expected topk_weights [R, k] = [4, 2], got [4, 3]",
        ),
        (IDS, 2**20, {"align": 2**12}, "expected less than 2^31 sorted rows, got 42"),
    ],
)
def test_rejects_values(ids, E, given, error):
    for op in (moe_sort, reference.moe_sort):
        with pytest.raises(ValueError, match=rf"^moe_sort: .*{re.escape(error)}"):
            op(ids, E, **given)


def test_rejects_types():
    weights = torch.ones(4, 2)
    with pytest.raises(TypeError, match=r"^moe_sort: expected topk_weights in .*float64; m2ae"):
        moe_sort(IDS, 3, topk_weights=weights.double())
    for op in (moe_sort, reference.moe_sort):
        with pytest.raises(TypeError, match=r"moe_sort: expected topk_ids in int32, int64, got"):
            op(IDS.float(), 3)
        with pytest.raises(TypeError, match=r"moe_sort: expected topk_weights in .*got torch.int3"):
            op(IDS, 3, topk_weights=IDS)
        with pytest.raises(TypeError, match=r"topk_weights on the device of topk_ids, cpu, got me"):
            op(IDS, 3, topk_weights=weights.to("meta"))


def test_registered_op_refuses_what_only_it_can_be_given():
    op = torch.ops.m2ae_kernels.moe_sort
    for arguments, error in [
        ((IDS.long(), 3, None, 0, None, 1), "topk_ids [R, k] of int32"),
        ((IDS, 0, None, 0, None, 1), "expected k, E and align of 1 or more"),
        ((IDS, 3, None, 3, None, 1), "expected drop_policy 0, 1 or 2"),
        ((IDS, 3, -1, 0, None, 1), "no negative capacity"),
        ((IDS, 3, 1, 2, None, 1), "topk_weights [R, k] of float32 on the device of topk_ids for"),
        ((IDS, 2**20, None, 0, None, 2**12), "expected less than 2^31 rows"),
    ]:
        with pytest.raises(RuntimeError, match=rf"moe_sort: .*{re.escape(error)}"):
            op(*arguments)
