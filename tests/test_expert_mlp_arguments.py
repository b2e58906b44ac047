"""What expert_mlp refuses, and how it says so."""

import pytest
import torch
from expert_mlp_cases import call, case_of, routing_of

from m2ae_kernels import expert_mlp


def refuses(error, match, *, changes=None, ids=None, routing=None, **options):
    inputs, given = case_of(4, 6, 7, 5, 3, 2)
    order = routing_of(given, 3) if routing is None else routing
    inputs |= {name: change(inputs[name]) for name, change in (changes or {}).items()}
    with pytest.raises(error, match=match):
        call(expert_mlp, inputs, given if ids is None else ids, order, **options)


@pytest.mark.parametrize(
    "name,change,match",
    [
        ("x", lambda t: t[0], r"expected x \[T, D\], got \[6\]"),
        ("x", lambda t: t[:3], r"expected R = S \* T = 1 \* 3 rows of topk_weights, got 4"),
        ("x", lambda t: t[:, :0], r"expected E, D, H, Do and k of 1 or more, got x \[4, 0\]"),
        ("w1", lambda t: t[0], r"expected w1 \[E, H, D\], got \[7, 6\]"),
        ("w1", lambda t: t[:, :6], r"expected w1 \[E = 3, H = 7, D = 6\], got \[3, 6, 6\]"),
        ("w1", lambda t: t[:2], r"expected w1 \[E = 3, H = 7, D = 6\], got \[2, 7, 6\]"),
        ("w2", lambda t: t[0], r"expected w2 \[E, Do, H\], got \[5, 7\]"),
        ("topk_weights", lambda t: t[0], r"expected topk_weights \[R, k\], got \[2\]"),
        ("b1", lambda t: t[:, :3], r"expected b1 \[E = 3, H = 7\], got \[3, 3\]"),
        ("b2", lambda t: t[:, :3], r"expected b2 \[E = 3, Do = 5\], got \[3, 3\]"),
        ("shift", lambda _: torch.zeros(6), r"expected shift \[S, D = 6\], got \[6\]"),
        ("shift", lambda _: torch.zeros(2, 6), r"expected R = S \* T = 2 \* 4 rows"),
        ("shift", lambda _: torch.zeros(0, 6), r"expected R = S \* T = 0 \* 4 rows"),
    ],
)
def test_shapes(name, change, match):
    refuses(ValueError, f"expert_mlp: {match}", changes={name: change})


def test_shapes_of_a_gated_activation():
    match = r"expert_mlp: expected w1 \[E = 3, 2 H = 14, D = 6\], got \[3, 7, 6\]"
    refuses(ValueError, match, activation="swiglu")
    changes = {"w1": lambda t: torch.cat([t, t], 1)}
    match = r"expert_mlp: expected b1 \[E = 3, 2 H = 14\], got \[3, 7\]"
    refuses(ValueError, match, changes=changes, activation="swiglu")


@pytest.mark.parametrize(
    "options,match",
    [
        ({"activation": "elu"}, r"expected activation in identity, .*, got 'elu'"),
        ({"output_activation": "swiglu"}, r"expected output_activation in .*, got 'swiglu'"),
        ({"dropout_p": 1.0}, r"expected 0 <= dropout_p < 1, got 1.0"),
        ({"dropout_p": -0.1}, r"expected 0 <= dropout_p < 1, got -0.1"),
        ({"output_dropout_p": 2}, r"expected 0 <= output_dropout_p < 1, got 2"),
        ({"dropout_p": float("nan")}, r"expected 0 <= dropout_p < 1, got nan"),
        (
            {"apply_router_weight": "both"},
            r'expected apply_router_weight "output", .* got \'both\'',
        ),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, r"expected seed \[2\], got \[3\]"),
    ],
)
def test_values(options, match):
    refuses(ValueError, f"expert_mlp: {match}", **options)


@pytest.mark.parametrize("name", ["x", "w1", "w2", "topk_weights", "b1", "b2"])
def test_dtypes(name):
    refuses(TypeError, f"expert_mlp: expected {name} in ", changes={name: lambda t: t.int()})


def test_one_dtype():
    match = r"expert_mlp: expected w2 in the dtype of x, torch.float32, got torch.bfloat16"
    refuses(TypeError, match, changes={"w2": lambda t: t.bfloat16()})
    match = r"expected x in float32, .* got torch.float64; m2ae_kernels.reference.expert_mlp takes"
    refuses(TypeError, match, changes={"x": lambda t: t.double()})
    for dtype in (torch.bfloat16, torch.float64):
        match = f"expected topk_weights in float32, got {dtype}"
        refuses(TypeError, match, changes={"topk_weights": lambda t, dtype=dtype: t.to(dtype)})
    refuses(TypeError, "expected seed in int64", seed=torch.zeros(2), dropout_p=0.1)


def test_devices():
    for name in ("w1", "w2", "b1", "b2", "topk_weights"):
        match = f"expert_mlp: expected {name} on the device of x, cpu, got meta"
        refuses(TypeError, match, changes={name: lambda t: t.to("meta")})
    seed = torch.zeros(2, dtype=torch.int64, device="meta")
    refuses(TypeError, "expected seed on the device of x", seed=seed, dropout_p=0.1)


def test_ids_and_routing():
    _, ids = case_of(4, 6, 7, 5, 3, 2)
    good = routing_of(ids, 3)
    refuses(ValueError, r"expected topk_ids \[R = 4, k = 2\], got \[3, 2\]", ids=ids[:3])
    refuses(TypeError, r"expected topk_ids in int32, int64, got torch.float32", ids=ids.float())
    for change, error, match in (
        ({"inverse_ids": good.inverse_ids[:3]}, ValueError, r"inverse_ids \[R = 4, k = 2\], got"),
        ({"expert_offsets": good.expert_offsets[:3]}, ValueError, r"expert_offsets \[E \+ 1 = 4\]"),
        ({"sorted_ids": good.sorted_ids[:7]}, ValueError, r"N >= R \* k = 8, got \[7\]"),
        ({"sorted_ids": good.sorted_ids.long()}, TypeError, r"routing.sorted_ids in int32, got"),
        ({"inverse_ids": good.inverse_ids.to("meta")}, TypeError, r"on the device of x"),
    ):
        refuses(error, f"expert_mlp: expected .*{match}", routing=good._replace(**change))


@pytest.mark.parametrize(
    "name,index,value",
    [
        ("sorted_ids", 0, 8),
        ("sorted_ids", 3, -2),
        ("inverse_ids", (0, 0), 8),
        ("inverse_ids", (3, 1), -2),
        ("expert_offsets", 3, 9),
        ("expert_offsets", 0, -1),
        ("expert_offsets", 1, 9),
    ],
)
def test_routing_that_points_outside(name, index, value):
    _, ids = case_of(4, 6, 7, 5, 3, 2)
    bad = routing_of(ids, 3)
    getattr(bad, name)[index] = value
    refuses(ValueError, "expert_mlp: expected a routing as moe_sort returns it", routing=bad)
