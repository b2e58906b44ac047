"""What Triton's interpreter is spared, as it takes half a second for a small call."""

import os

import numpy as np
import pytest
import torch

np.seterr(all="ignore")  # it computes in NumPy, which warns of every infinity


def interpreted():
    """Whether this test runs Triton's interpreter."""
    return "[triton" in os.environ["PYTEST_CURRENT_TEST"] and not torch.cuda.is_available()


def interpret_only(*cases):
    """Of the cases of a test leave the interpreter these, by id; a GPU and the CPU have all."""
    case = os.environ["PYTEST_CURRENT_TEST"].partition("[triton-")[2].partition("] (")[0]
    if interpreted() and case not in cases:
        pytest.skip("interpreted, as are other cases of this test")


def fewer(cases, number=1):
    """Of what a test goes through leave the interpreter the first ones."""
    return list(cases)[:number] if interpreted() else list(cases)


def skip_if_interpreted(why):
    if interpreted():
        pytest.skip(f"interpreted, {why}")
