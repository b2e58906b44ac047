"""Experts in the form of transformers, and how near a result has to be."""

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.9")
from transformers.activations import ACT2FN  # noqa: E402
from transformers.integrations import moe  # noqa: E402

E, K, D, H = 5, 2, 32, 24


def assert_same(actual, expected, relative=4e-6):
    # A product here sums up to 50 terms, so its rounding is about sqrt(50) 2^-24 = 4e-7 of it; from
    # the ids to a gradient of the embedding there are some 20 in a row, whose errors add up as
    # random numbers do, to 2e-6. Both sides err so much.
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        assert (actual[name] - right).norm() <= relative * right.norm(), name


def made_experts(act="silu", dtype=torch.float32, **layout):
    """Experts in transformers' form and any of its layouts, and the same in float64."""

    @moe.use_experts_implementation(**layout)
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            gated, transposed = layout.get("has_gate", True), layout.get("is_transposed", False)
            shapes = {("gate_up" if gated else "up"): (2 * H if gated else H, D), "down": (D, H)}
            for name, (rows, columns) in shapes.items():
                shape = (E, columns, rows) if transposed else (E, rows, columns)
                weight = nn.Parameter(torch.randn(shape) / columns**0.5)
                self.register_parameter(f"{name}_proj", weight)
                if layout.get("has_bias"):
                    self.register_parameter(f"{name}_proj_bias", nn.Parameter(torch.randn(E, rows)))
            self.act_fn = ACT2FN[act] if isinstance(act, str) else act

        def forward(self, x, ids, weights):
            """From the definition: each slot by itself."""
            out = []
            for row, of_row, w in zip(x, ids.tolist(), weights, strict=True):
                terms = [w[j] * self.of_expert(e, row) for j, e in enumerate(of_row) if e < E]
                out.append(sum(terms, torch.zeros_like(row)))
            return torch.stack(out)

        def of_expert(self, e, x):
            gated = layout.get("has_gate", True)
            h = self.linear("gate_up_proj" if gated else "up_proj", e, x)
            h = self.act_fn(h[:H]) * h[H:] if gated else self.act_fn(h)
            return self.linear("down_proj", e, h)

        def linear(self, name, e, x):
            weight = getattr(self, name)[e]
            y = x @ weight if layout.get("is_transposed") else weight @ x
            return y + getattr(self, f"{name}_bias")[e] if layout.get("has_bias") else y

    torch.manual_seed(0)
    config = transformers.PreTrainedConfig()
    config._experts_implementation = "m2ae_kernels"
    ours = Experts(config).to(dtype)
    exact = copy.deepcopy(ours).double()
    exact.config._experts_implementation = "eager"
    return ours, exact


def tokens(T=17):
    weights, ids = torch.rand(T, E).softmax(1).topk(K)
    return torch.randn(T, D), ids, weights
