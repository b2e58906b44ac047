"""Schedules: values at the steps that matter."""

import pytest

from m2ae.training.schedule import cosine_with_warmup, linear


def test_learning_rate_rises_then_falls_to_its_end():
    factors = [cosine_with_warmup(step, 101, 10, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.55)  # the middle of the cosine: (1 + 0.1) / 2
    assert factors[-1] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_one_step_has_the_full_learning_rate():
    assert cosine_with_warmup(0, 1, 0, 0.1) == 1.0


def test_decay_moves_linearly_from_start_to_end():
    assert linear(0, 11, 0.996, 1.0) == 0.996
    assert linear(5, 11, 0.996, 1.0) == pytest.approx(0.998)
    assert linear(10, 11, 0.996, 1.0) == 1.0
    assert linear(0, 1, 0.996, 1.0) == 0.996
