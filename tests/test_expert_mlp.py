"""expert_mlp: all arguments, all gradients, against all experts on all tokens in float64."""

import pytest
import torch
from expert_mlp_cases import (
    GLUS,
    assert_matches,
    assert_near,
    call,
    case_of,
    formula,
    gradients,
    leaves,
    routing_of,
)
from interpreter import fewer, interpret_only, interpreted

from m2ae_kernels.ops._activations import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (T, D, H, Do, E, k): no tokens, one of everything, k = E, no multiple of a vector or a tile,
# more rows per expert than a block of any kernel has, hidden channels in several panels that two
# workers share, experts that nobody chose; even D, H and Do, of which bfloat16 products are made
SHAPES = [
    (0, 5, 4, 3, 2, 1),
    (1, 1, 1, 1, 1, 1),
    (7, 16, 8, 16, 3, 3),
    (33, 43, 67, 37, 5, 2),
    (300, 24, 40, 24, 3, 2),
    (530, 20, 600, 9, 2, 1),
    (1300, 34, 310, 18, 2, 1),
    (2, 10, 103, 17, 12, 4),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T,D,H,Do,E,k", SHAPES)
def test_matches_all_experts_on_all_tokens(T, D, H, Do, E, k, dtype, impl):
    interpret_only(
        "0-5-4-3-2-1-torch.float32", "1-1-1-1-1-1-torch.bfloat16", "33-43-67-37-5-2-torch.bfloat16",
        "33-43-67-37-5-2-torch.float32", "7-16-8-16-3-3-torch.float16",
        "300-24-40-24-3-2-torch.float32", "2-10-103-17-12-4-torch.float32",
    )  # fmt: skip
    op, device = impl
    inputs, ids = case_of(T, D, H, Do, E, k, device=device, dtype=dtype)
    assert_matches(op, inputs, ids, routing_of(ids, E), dtype)
    inputs, ids = case_of(T, D, H, Do, E, k, device=device, dtype=dtype, S=2, activation="swiglu")
    options = {"activation": "swiglu", "dropout_p": 0.3, "output_dropout_p": 0.2}
    assert_matches(op, inputs, ids, routing_of(ids, E), dtype, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, impl):
    op, device = impl
    inputs, ids = case_of(20, 12, 19, 10, 4, 2, device=device, activation=activation)
    assert_matches(op, inputs, ids, routing_of(ids, 4), activation=activation)
    options = {"activation": activation, "dropout_p": 0.3, "output_dropout_p": 0.2}
    assert_matches(op, inputs, ids, routing_of(ids, 4), **options)
    if activation not in GLUS:
        options = {"output_activation": activation, "output_dropout_p": 0.2}
        for at in fewer(("output", "input", "none")):
            options["apply_router_weight"] = at
            assert_matches(op, inputs, ids, routing_of(ids, 4), **options)


@pytest.mark.parametrize("at", ["output", "input", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_argument_at_once(dtype, at, impl):
    interpret_only("torch.float32-none", "torch.bfloat16-output", "torch.float16-input")
    op, device = impl
    options = {"activation": "swiglu", "output_activation": "silu", "apply_router_weight": at}
    options |= {"dropout_p": 0.4, "output_dropout_p": 0.1}
    inputs, ids = case_of(19, 37, 30, 9, 5, 3, device=device, dtype=dtype, S=2, activation="swiglu")
    routing = routing_of(ids, 5, capacity=20, align=8)
    assert (routing.inverse_ids < 0).any()
    assert_matches(op, inputs, ids, routing, dtype, **options)


@pytest.mark.parametrize("at", ["output", "input", "none"])
@pytest.mark.parametrize("biases", [(), ("b1",), ("b2",)])
def test_biases_are_optional(biases, at, impl):
    interpret_only("biases0-output", "biases1-input", "biases2-none")
    op, device = impl
    inputs, ids = case_of(11, 8, 9, 8, 4, 2, device=device)
    inputs |= {name: None for name in ("b1", "b2") if name not in biases}
    options = {"apply_router_weight": at, "dropout_p": 0.2, "output_dropout_p": 0.2}
    assert_matches(op, inputs, ids, routing_of(ids, 4), **options)


@pytest.mark.parametrize("S", [1, 3])
def test_streams_share_tokens(S, impl):
    interpret_only("3")
    op, device = impl
    inputs, ids = case_of(13, 8, 9, 7, 4, 2, device=device, S=S)
    assert_matches(op, inputs, ids, routing_of(ids, 4), dropout_p=0.3)
    # Row s T + t is the token t of stream s.
    out = call(op, inputs, ids, routing_of(ids, 4))
    for s in range(S):
        rows = slice(13 * s, 13 * s + 13)
        alone = inputs | {"x": inputs["x"] + inputs["shift"][s], "shift": None}
        alone["topk_weights"] = inputs["topk_weights"][rows]
        single = call(op, alone, ids[rows], routing_of(ids[rows], 4))
        assert_near(out[rows], single.double(), torch.float32, "stream")


def test_m3_jepa_dense_maths(impl):
    # Its released module: all experts on all tokens, stacked, gathered, weighted; two streams.
    op, device = impl
    T, D, E, k = 12, 16, 12, 4
    inputs, _ = case_of(T, D, D, D, E, k, device=device, S=2)
    u = torch.cat([inputs["x"] + row for row in inputs["shift"]])
    gate = torch.nn.Linear(D, E, device=device)
    weights, ids = gate(u).softmax(-1).detach().topk(k)
    inputs["topk_weights"] = weights
    outs = torch.stack(
        [
            torch.nn.functional.gelu(u @ inputs["w1"][e].T + inputs["b1"][e]) @ inputs["w2"][e].T
            + inputs["b2"][e]
            for e in range(E)
        ],
        1,
    )
    expected = (outs.gather(1, ids[..., None].expand(-1, -1, D)) * weights[..., None]).sum(1)
    actual = call(op, inputs, ids.int(), routing_of(ids, E))
    assert_near(actual, expected.double(), torch.float32, "out")


def test_masked_and_dropped_slots_count_nothing(impl):
    op, device = impl
    inputs, ids = case_of(20, 8, 9, 7, 4, 2, device=device)
    ids[3:6] = -1
    ids[9, 1] = -1
    assert_matches(op, inputs, ids, routing_of(ids, 4))
    routing = routing_of(ids, 4, capacity=3)
    nobody = (routing.inverse_ids < 0).all(1)
    assert nobody.sum() > 5
    assert_matches(op, inputs, ids, routing)
    assert_matches(op, inputs, ids, routing_of(ids, 4, capacity=0))
    # Tokens that nobody computes on are not read, nor are their weights.
    poisoned = leaves(inputs)
    with torch.no_grad():
        poisoned["x"][nobody] = torch.nan
        poisoned["topk_weights"][routing.inverse_ids < 0] = torch.nan
    out = call(op, poisoned, ids, routing)
    assert not out[nobody].any()
    assert torch.equal(out, call(op, inputs, ids, routing))
    grads = gradients(out, poisoned, torch.ones_like(out))
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["x"][nobody].any()
    assert not grads["topk_weights"][routing.inverse_ids < 0].any()


@pytest.mark.parametrize("align", [8, 16, 64])
def test_padding_rows_change_nothing(align, impl):
    interpret_only("16")
    op, device = impl
    inputs, ids = case_of(20, 8, 9, 7, 4, 2, device=device)
    assert_matches(op, inputs, ids, routing_of(ids, 4, align=align), dropout_p=0.3)


@pytest.mark.parametrize(
    "chosen", [[0, 1], [1, 2], [2, 3], [3, 0]], ids=["last", "first", "first two", "middle"]
)
def test_gradients_of_empty_experts_are_exact_zeros(chosen, impl):
    interpret_only("last", "middle")
    op, device = impl
    inputs, ids = case_of(16, 8, 9, 7, 4, 2, device=device)
    ids[:] = torch.tensor(chosen, dtype=torch.int32)
    assert_matches(op, inputs, ids, routing_of(ids, 4))
    ours = leaves(inputs)
    grads = gradients(call(op, ours, ids, routing_of(ids, 4)), ours, torch.ones(16, 7).to(device))
    for e in range(4):
        for name in ("w1", "w2", "b1", "b2"):
            assert grads[name][e].any() == (e in chosen)


def test_expert_of_one_row_and_of_many(impl):
    op, device = impl
    T = 500 if interpreted() else 5000
    inputs, ids = case_of(T, 3, 4, 2, 3, 1, device=device)
    ids[:] = 2
    ids[77] = 1
    assert_matches(op, inputs, ids, routing_of(ids, 3))


def test_weights_that_cancel(impl):
    # w and -w on two experts that are the same, beside a third: 16-bit sums would lose the third.
    op, device = impl
    inputs, ids = case_of(9, 8, 9, 7, 3, 3, device=device, dtype=torch.bfloat16)
    ids[:] = torch.tensor([0, 1, 2], dtype=torch.int32)
    for name in ("w1", "w2", "b1", "b2"):
        inputs[name][1] = inputs[name][0]
    inputs["topk_weights"][:] = torch.tensor([1024.0, -1024.0, 1.0])
    out = call(op, inputs, ids, routing_of(ids, 3))
    expected = formula(inputs, ids, routing_of(ids, 3).inverse_ids)
    assert_near(out, expected, torch.bfloat16, "out")


def test_tokens_do_not_see_each_other(impl):
    op, device = impl
    inputs, ids = case_of(40, 16, 24, 16, 4, 2, device=device)
    out = call(op, inputs, ids, routing_of(ids, 4))
    order = torch.randperm(40, device=device)
    moved = inputs | {name: inputs[name][order] for name in ("x", "topk_weights")}
    permuted = call(op, moved, ids[order], routing_of(ids[order], 4))
    assert_near(permuted, out[order].double(), torch.float32, "permuted")
