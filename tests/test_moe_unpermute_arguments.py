"""moe_unpermute refuses what it cannot mean, by name."""

import re

import pytest
import torch

from m2ae_kernels import moe_sort, moe_unpermute, reference

ROUTING = moe_sort(torch.tensor([[0, 1], [1, 2], [0, 2], [0, 1]]), 3)
Y = torch.ones(8, 5)
ROWS = torch.ones(4, 5)


@pytest.mark.parametrize(
    "y,routing,given,error",
    [
        (Y[0], ROUTING, {}, "expected y [N = 8, D], got [5]"),
        (Y[:7], ROUTING, {}, "expected y [N = 8, D], got [7, 5]"),
        (
            Y,
            ROUTING._replace(inverse_ids=ROUTING.sorted_ids),
            {},
            "expected routing.inverse_ids [R, k] with k >= 1, got [8]",
        ),
        (
            Y,
            ROUTING,
            {"topk_weights": torch.ones(4, 3)},
            "expected topk_weights [R, k] = [4, 2], got [4, 3]",
        ),
        (Y, ROUTING, {"residual": Y}, "expected residual [R, D] = [4, 5], got [8, 5]"),
        (Y, ROUTING, {"out": Y}, "expected out [R, D] = [4, 5], got [8, 5]"),
        (
            Y,
            ROUTING,
            {"out": torch.ones(5, 4).t()},
            "expected out contiguous, got strides [1, 4]",
        ),
        (
            Y,
            ROUTING,
            {"out": ROWS, "topk_weights": torch.ones(4, 2, requires_grad=True)},
            "no gradient to be needed with out, got tensors that require one; leave out, or call",
        ),
    ],
)
def test_rejects_values(y, routing, given, error):
    for op in (moe_unpermute, reference.moe_unpermute):
        with pytest.raises(ValueError, match=rf"^moe_unpermute: .*{re.escape(error)}"):
            op(y, routing, **given)


def test_rejects_types():
    weights = torch.ones(4, 2)
    with pytest.raises(TypeError, match=r"^moe_unpermute: expected y in .*float64; m2ae_kernels\."):
        moe_unpermute(Y.double(), ROUTING)
    with pytest.raises(TypeError, match=r"expected topk_weights in .*float64; m2ae_kernels\.refer"):
        moe_unpermute(Y, ROUTING, weights.double())
    for op in (moe_unpermute, reference.moe_unpermute):
        with pytest.raises(TypeError, match=r"moe_unpermute: expected y in .*, got torch.int64"):
            op(Y.long(), ROUTING)
        with pytest.raises(TypeError, match=r"topk_weights in .*, got torch.int64"):
            op(Y, ROUTING, weights.long())
        for name in ("residual", "out"):
            wanted = f"expected {name} in the dtype of y, torch.float32, got torch.bfloat16"
            with pytest.raises(TypeError, match=wanted):
                op(Y, ROUTING, **{name: ROWS.bfloat16()})
            with pytest.raises(TypeError, match=f"{name} on the device of y, cpu, got meta"):
                op(Y, ROUTING, **{name: ROWS.to("meta")})
        with pytest.raises(TypeError, match=r"routing.sorted_ids in int32, got torch.int64"):
            op(Y, ROUTING._replace(sorted_ids=ROUTING.sorted_ids.long()))
        with pytest.raises(TypeError, match=r"routing.inverse_ids on the device of y, cpu, got me"):
            op(Y, ROUTING._replace(inverse_ids=ROUTING.inverse_ids.to("meta")))


def test_rejects_out_in_the_memory_of_inputs():
    memory = torch.zeros(60)
    out = memory[:20].view(4, 5)
    for y, weights, residual, name in [
        (memory[15:55].view(8, 5), None, None, "y"),
        (Y, memory[19:27].view(4, 2), None, "topk_weights"),
        (Y, None, memory[5:25].view(4, 5), "residual"),
        (Y, None, memory[:20].view(5, 4).t(), "residual"),  # the same memory in another order
    ]:
        with pytest.raises(ValueError, match=f"expected out apart from {name}, got shared memory"):
            moe_unpermute(y, ROUTING, weights, residual=residual, out=out)
    behind = memory[20:60].view(8, 5)
    assert moe_unpermute(behind, ROUTING, out=out) is out


@pytest.mark.parametrize("bad", [-2, 8, 2**31 - 1])
def test_routing_that_leads_out_of_range(bad):
    inverse = ROUTING.inverse_ids.clone()
    inverse[2, 1] = bad
    for given in ({}, {"out": ROWS.clone()}):
        with pytest.raises(
            ValueError, match=r"^moe_unpermute: expected inverse_ids of the routing"
        ):
            moe_unpermute(Y, ROUTING._replace(inverse_ids=inverse), **given)


def test_registered_op_refuses_what_only_it_can_be_given():
    op = torch.ops.m2ae_kernels.moe_unpermute
    to = torch.ops.m2ae_kernels.moe_unpermute_out
    back = torch.ops.m2ae_kernels.moe_unpermute_backward
    ids = ROUTING.sorted_ids, ROUTING.inverse_ids
    weights = torch.ones(4, 2)
    for call, error in [
        (lambda: op(Y.double(), *ids, None, None), "expected y in float32, bfloat16 or float16"),
        (lambda: op(Y[:7], *ids, None, None), "as many sorted_ids as sorted rows, 7, got 8"),
        (lambda: op(Y, *ids, weights.double(), None), "topk_weights [R, k] of float32"),
        (lambda: op(Y, *ids, None, Y), "expected residual [R, D] in the dtype of y"),
        (lambda: op(Y, *ids, None, ROWS.half()), "expected residual [R, D] in the dtype of y"),
        (lambda: to(Y, *ids, None, None, Y.clone()), "expected out [R, D], contiguous, in the"),
        (lambda: back(Y, Y, *ids, weights, [True, True]), "expected grad_out [R = 4, D]"),
        (lambda: back(ROWS, ROWS, *ids, weights, [True, True]), "expected y [N, D] in the dtype"),
    ]:
        with pytest.raises(RuntimeError, match=rf"moe_unpermute: .*{re.escape(error)}"):
            call()
