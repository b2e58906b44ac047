"""What expert_mlp keeps for its backward, what that does without, and what it never reads."""

import pytest
import torch
from expert_mlp_cases import (
    NAMES,
    assert_matches,
    assert_near,
    call,
    case_of,
    leaves,
    registered_arguments,
    routing_of,
)
from interpreter import fewer

from m2ae_kernels import expert_mlp
from m2ae_kernels.ops import _expert_mlp_op
from m2ae_kernels.ops._activations import IDENTITY

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def saved_by(function):
    """Bytes of each storage that autograd keeps, by address."""
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(saved.values())


def test_rows_without_a_slot_are_not_read_in_backward(impl):
    _, device = impl
    inputs, ids = case_of(20, 6, 7, 5, 4, 2, device=device)
    routing = routing_of(ids, 4, capacity=5, align=8)
    given = {"activation": "gelu", "output_activation": "silu", "device": device}
    arguments = registered_arguments(inputs, routing, p=0.2, at=0, **given)
    out, h, y = torch.ops.m2ae_kernels.expert_mlp(*arguments, True)
    nobody = routing.sorted_ids < 0
    assert nobody.sum() > 20
    assert not h[nobody].any()
    assert not y[nobody].any()
    backward = torch.ops.m2ae_kernels.expert_mlp_backward
    mask = [True] * 6 + [False]
    grad = torch.randn_like(out)
    clean = backward(grad, *arguments[:11], h, y, *arguments[11:], mask)
    h[nobody], y[nobody] = torch.nan, torch.nan
    poisoned = backward(grad, *arguments[:11], h, y, *arguments[11:], mask)
    assert all(map(torch.equal, clean, poisoned))
    assert all(tensor.isfinite().all() for tensor in clean)


@pytest.mark.parametrize("activation,wide", [("gelu", 1), ("swiglu", 2)])
def test_saved_memory(activation, wide, impl):
    op, device = impl
    T, D, H, E, k = 64, 16, 40, 4, 2
    inputs, ids = case_of(T, D, H, D, E, k, device=device, activation=activation)
    ours = leaves(inputs)
    routing = routing_of(ids, E)
    options = {"activation": activation, "dropout_p": 0.1, "output_dropout_p": 0.1}
    saved = saved_by(lambda: call(op, ours, ids, routing, **options))
    parameters = sum(ours[name].nbytes for name in ("w1", "w2", "b1", "b2"))
    N = T * k
    # x, h, and per row: its weight, its sorted and its inverse id; with expert_offsets and the seed
    assert saved - parameters <= 4 * (T * D + N * wide * H) + 16 * N + 64
    with torch.no_grad():
        arguments = registered_arguments(
            inputs,
            routing,
            activation=activation,
            output_activation="silu",
            p=0,
            at=0,
            device=device,
        )
        _, h, y = torch.ops.m2ae_kernels.expert_mlp(*arguments, False)
    assert h.numel() == y.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", ["output", "input", "none"])
def test_a_large_h_is_computed_again(at, dtype, monkeypatch):
    monkeypatch.setattr(_expert_mlp_op, "LARGEST_SAVED_H", 0)
    for T, D, H, Do in ((9, 5, 7, 3), (610, 34, 310, 18)):  # bfloat16 products take even ones
        inputs, ids = case_of(T, D, H, Do, 3, 2, dtype=dtype)
        options = {"apply_router_weight": at, "dropout_p": 0.3}
        assert_matches(expert_mlp, inputs, ids, routing_of(ids, 3, align=4), dtype, **options)
        options |= {"activation": "geglu", "output_dropout_p": 0.2}
        inputs, ids = case_of(T, D, H, Do, 3, 2, dtype=dtype, S=2, activation="geglu")
        routing = routing_of(ids, 3, capacity=T)
        assert_matches(expert_mlp, inputs, ids, routing, dtype, **options)
        ours = leaves(inputs)
        saved = saved_by(lambda: call(expert_mlp, ours, ids, routing, **options))  # noqa: B023
        given = sum(tensor.nbytes for tensor in ours.values())
        assert saved <= given + 12 * ids.numel() + 64  # with the routing and the seed
        # y, which an output activation needs, is kept, and so is h.
        options["output_activation"] = "silu"
        assert_matches(expert_mlp, inputs, ids, routing, dtype, **options)


def test_which_h_is_large():
    x, w1 = torch.empty(1, 4), torch.empty(1, 1024, 4)
    rows = _expert_mlp_op.LARGEST_SAVED_H // (1024 * 4)
    assert _expert_mlp_op.saves_h(x, w1, rows, IDENTITY)
    assert not _expert_mlp_op.saves_h(x, w1, rows + 1, IDENTITY)
    assert _expert_mlp_op.saves_h(x.bfloat16(), w1, rows + 1, IDENTITY)
    assert _expert_mlp_op.saves_h(x, w1, rows + 1, IDENTITY + 1)
    assert _expert_mlp_op.saves_h(x.to("meta"), w1, rows + 1, IDENTITY)


def test_backward_without_h(impl):
    _, device = impl
    function = torch.ops.m2ae_kernels.expert_mlp_backward
    for activation, S, at in fewer((("swiglu", 2, 1), ("gelu", None, 0), ("relu", 3, 2))):
        inputs, ids = case_of(40, 6, 9, 5, 4, 2, device=device, S=S, activation=activation)
        routing = routing_of(ids, 4, capacity=20, align=8)
        given = {"activation": activation, "output_activation": "identity", "device": device}
        arguments = registered_arguments(inputs, routing, p=0.3, at=at, **given)
        out, h, y = torch.ops.m2ae_kernels.expert_mlp(*arguments, True)
        assert h.dim() == 2
        mask = [inputs[name] is not None for name in NAMES]
        grad = torch.randn_like(out)
        with_h, without = (
            function(grad, *arguments[:11], of_h, y, *arguments[11:], mask)
            for of_h in (h, h.new_empty(0))
        )
        for name, tensor, wanted in zip(NAMES, without, with_h, strict=True):
            assert_near(tensor, wanted.double(), torch.float32, name)
