"""moe_permute refuses what it cannot mean, by name."""

import re

import pytest
import torch

from m2ae_kernels import moe_permute, moe_sort, reference

ROUTING = moe_sort(torch.tensor([[0, 1], [1, 2], [0, 2], [0, 1]]), 3)
X = torch.ones(4, 5)


@pytest.mark.parametrize(
    "x,routing,weights,error",
    [
        (X[0], ROUTING, None, "expected x [T, D], got [5]"),
        (X[:3], ROUTING, None, "expected R of the routing to be a multiple of T = 3, got 4"),
        (X[:0], ROUTING, None, "expected R of the routing to be a multiple of T = 0, got 4"),
        (X, ROUTING, X, "expected topk_weights [R, k] = [4, 2], got [4, 5]"),
        (
            X,
            ROUTING._replace(sorted_ids=ROUTING.inverse_ids),
            None,
            "expected routing.sorted_ids [N], got [4, 2]",
        ),
        (
            X,
            ROUTING._replace(inverse_ids=ROUTING.sorted_ids),
            None,
            "expected routing.inverse_ids [R, k] with k >= 1, got [8]",
        ),
        (
            X,
            ROUTING._replace(inverse_ids=ROUTING.inverse_ids[:, :0]),
            None,
            "expected routing.inverse_ids [R, k] with k >= 1, got [4, 0]",
        ),
    ],
)
def test_rejects_values(x, routing, weights, error):
    for op in (moe_permute, reference.moe_permute):
        with pytest.raises(ValueError, match=rf"^moe_permute: .*{re.escape(error)}"):
            op(x, routing, topk_weights=weights)


def test_rejects_types():
    weights = torch.ones(4, 2)
    with pytest.raises(TypeError, match=r"^moe_permute: expected x in .*float64; m2ae_kernels\.r"):
        moe_permute(X.double(), ROUTING)
    with pytest.raises(TypeError, match=r"expected topk_weights in .*float64; m2ae_kernels\.refer"):
        moe_permute(X, ROUTING, topk_weights=weights.double())
    for op in (moe_permute, reference.moe_permute):
        with pytest.raises(TypeError, match=r"moe_permute: expected x in .*, got torch.int64"):
            op(X.long(), ROUTING)
        with pytest.raises(TypeError, match=r"topk_weights in .*, got torch.int64"):
            op(X, ROUTING, topk_weights=weights.long())
        with pytest.raises(TypeError, match=r"routing.inverse_ids in int32, got torch.int64"):
            op(X, ROUTING._replace(inverse_ids=ROUTING.inverse_ids.long()))
        with pytest.raises(TypeError, match=r"routing.sorted_ids on the device of x, cpu, got me"):
            op(X, ROUTING._replace(sorted_ids=ROUTING.sorted_ids.to("meta")))
        with pytest.raises(TypeError, match=r"topk_weights on the device of x, cpu, got meta"):
            op(X, ROUTING, topk_weights=weights.to("meta"))


@pytest.mark.parametrize("bad", [-2, 8, 2**31 - 1])
def test_routing_that_leads_out_of_range(bad):
    inverse = ROUTING.inverse_ids.clone()
    inverse[2, 1] = bad
    with pytest.raises(
        ValueError, match=r"^moe_permute: expected inverse_ids of the routing in \["
    ):
        moe_permute(X, ROUTING._replace(inverse_ids=inverse))


def test_registered_op_refuses_what_only_it_can_be_given():
    op = torch.ops.m2ae_kernels.moe_permute
    back = torch.ops.m2ae_kernels.moe_permute_backward
    ids = ROUTING.sorted_ids, ROUTING.inverse_ids
    weights = torch.ones(4, 2)
    for call, error in [
        (lambda: op(X.double(), *ids, None), "expected x in float32, bfloat16 or float16"),
        (lambda: op(X[0], *ids, None), "expected x [rows, D] on the CPU"),
        (lambda: op(X, ids[0].long(), ids[1], None), "expected sorted_ids of int32 with 1 dim"),
        (lambda: op(X, ids[0], ids[1].long(), None), "expected inverse_ids of int32 with 2 dim"),
        (lambda: op(X, ids[0], ids[1][:, :0], None), "expected inverse_ids [R, k] with k >= 1"),
        (lambda: op(X[:3], *ids, None), "R of the routing to be a multiple of T = 3, got 4"),
        (lambda: op(X, *ids, weights.double()), "topk_weights [R, k] of float32 on the CPU"),
        (lambda: op(X, *ids, weights[:3]), "topk_weights [R, k] of float32 on the CPU"),
        (lambda: back(X, None, ids[1], 4, 6, [True, False]), "expected grad_rows [N, D = 6]"),
        (lambda: back(X, None, ids[1], 4, 5, [True, False]), "inverse_ids of the routing in [-1"),
        (lambda: back(None, X, ids[1], 4, 5, [False, True]), "grad_row_weights [N] of float32"),
    ]:
        with pytest.raises(RuntimeError, match=rf"moe_permute: .*{re.escape(error)}"):
            call()
