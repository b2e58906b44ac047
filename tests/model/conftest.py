"""The small model and inputs for it."""

import pytest
import torch
from small_model import SMALL

from m2ae.models.m2ae import M2AE


@pytest.fixture
def small():
    """The small model, in training mode."""
    return M2AE(SMALL)


@pytest.fixture
def make_inputs():
    """A function (B, T) to random inputs of the small model; row b has 1 + b mod T tokens."""

    def make(B=4, T=6):
        return {
            "pixel_values": torch.rand(B, 3, 32, 32),
            "input_ids": torch.randint(0, 50, (B, T)),
            "text_mask": torch.arange(T) < 1 + torch.arange(B)[:, None] % T,
        }

    return make
