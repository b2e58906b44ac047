"""Dictionaries become dataclasses, or an error that says where and why not."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from m2ae.dataclass_io import from_dict, to_dict


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["cosine", "linear"] = "cosine"


@dataclass(frozen=True)
class Outer:
    steps: int
    name: str = "run"
    is_quiet: bool = False
    inner: Inner = field(default_factory=Inner)
    pair: tuple[float, float] = (0.0, 1.0)
    sizes: tuple[int, ...] = ()
    stages: list[Inner] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    limit: int | None = None
    mixed: int | str = 0
    anything: Any = None


FULL = {
    "steps": 3,
    "name": "x",
    "is_quiet": True,
    "inner": {"rate": 0.1, "kind": "linear"},
    "pair": [0.25, 0.75],
    "sizes": [1, 2, 3],
    "stages": [{"rate": 1.0, "kind": "cosine"}, {"rate": 2.0, "kind": "cosine"}],
    "weights": {"a": 1.5},
    "limit": 4,
    "mixed": "many",
    "anything": [1, {"b": None}],
}


def test_a_round_trip_changes_nothing():
    outer = from_dict(Outer, FULL)
    assert outer.inner == Inner(0.1, "linear")
    assert outer.pair == (0.25, 0.75)
    assert outer.stages[1] == Inner(2.0)
    assert to_dict(outer) == FULL
    assert from_dict(Outer, to_dict(outer)) == outer


def test_what_is_left_out_has_its_default():
    assert from_dict(Outer, {"steps": 1, "inner": {"kind": "linear"}}) == Outer(
        1, inner=Inner(kind="linear")
    )


def test_integers_become_floats_where_the_field_is_one():
    outer = from_dict(Outer, {"steps": 1, "inner": {"rate": 2}, "limit": None, "weights": {"a": 1}})
    assert type(outer.inner.rate) is float
    assert type(outer.weights["a"]) is float
    assert outer.limit is None


WRONG = [
    ({}, ValueError, "Outer.steps: expected a value, got none"),
    ({"step": 1}, ValueError, "Outer: expected only known keys, got 'step'; did you mean 'steps'"),
    ({"steps": 1, "zzz": 1}, ValueError, "got 'zzz'; known: anything, inner"),
    ({"steps": 1, "inner": {"rat": 1}}, ValueError, "Outer.inner: .* 'rat'; did you mean 'rate'"),
    ({"steps": 1.0}, TypeError, r"Outer.steps: expected int, got 1.0 \(float\)"),
    ({"steps": True}, TypeError, r"Outer.steps: expected int, got True \(bool\)"),
    ({"steps": None}, TypeError, "Outer.steps: expected int, got None"),
    ({"steps": 1, "is_quiet": 1}, TypeError, r"Outer.is_quiet: expected bool, got 1 \(int\)"),
    ({"steps": 1, "name": 3}, TypeError, "Outer.name: expected str, got 3"),
    ({"steps": 1, "inner": 3}, TypeError, "Outer.inner: expected keys and values, got 3"),
    (
        {"steps": 1, "inner": {"rate": True}},
        TypeError,
        "Outer.inner.rate: expected float, got True",
    ),
    ({"steps": 1, "inner": {"rate": "1e-3"}}, TypeError, "Outer.inner.rate: .*; write 0.001: YAML"),
    ({"steps": 1, "inner": {"rate": "1e-5"}}, TypeError, r"; write 1\.0e-05: YAML"),
    ({"steps": 1, "inner": {"rate": "fast"}}, TypeError, r"expected float, got 'fast' \(str\)$"),
    (
        {"steps": 1, "inner": {"kind": "cosin"}},
        ValueError,
        "'cosine' or 'linear', got 'cosin'; did you",
    ),
    ({"steps": 1, "pair": [1.0]}, ValueError, r"Outer.pair: expected 2 values, got 1: \[1.0\]"),
    ({"steps": 1, "pair": 1.0}, TypeError, "Outer.pair: expected tuple"),
    ({"steps": 1, "pair": [1.0, "x"]}, TypeError, r"Outer.pair\[1\]: expected float, got 'x'"),
    ({"steps": 1, "sizes": [1, 2.5]}, TypeError, r"Outer.sizes\[1\]: expected int, got 2.5"),
    ({"steps": 1, "stages": [{}, {"rate": "x"}]}, TypeError, r"Outer.stages\[1\].rate: expected"),
    ({"steps": 1, "weights": {"a": "x"}}, TypeError, "Outer.weights.a: expected float, got 'x'"),
    ({"steps": 1, "weights": [1.0]}, TypeError, "Outer.weights: expected dict"),
    ({"steps": 1, "limit": "x"}, TypeError, "Outer.limit: expected int, got 'x'"),
    ({"steps": 1, "mixed": 0.5}, TypeError, "Outer.mixed: expected int or str, got 0.5"),
    ({"steps": 1, "mixed": None}, TypeError, "Outer.mixed: expected int or str, got None"),
]


@pytest.mark.parametrize("data, error, message", WRONG)
def test_mistakes_are_named_with_their_place(data, error, message):
    with pytest.raises(error, match=message):
        from_dict(Outer, data)


def test_the_place_can_be_a_file():
    with pytest.raises(TypeError, match=r"recipe.yaml.steps: expected int"):
        from_dict(Outer, {"steps": "x"}, path="recipe.yaml")
