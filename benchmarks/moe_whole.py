"""What bench_moe_layer compares: router, sort, experts and combine, as users write them.

Two layers: "gelu" is M3-JEPA's, with biases and with several streams of the same tokens; "swiglu"
is that of Mixtral and Qwen, gated and without biases. Router weights are the softmax over all
experts at the k best, as they are.
"""

import importlib.util
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from moe_layers import PRODUCTS
from torch import Tensor, nn
from torch.nn import functional as F

from m2ae_kernels.nn import GroupedExperts, MoE, TopKRouter

OURS = "m2ae_kernels"
ACTIVATIONS = ("gelu", "swiglu")


@dataclass
class Layer:
    """T tokens of D numbers, S streams of them; k of E experts with H hidden values each."""

    activation: str
    k: int
    x: Tensor  # [T, D]
    shift: Tensor | None  # [S, D]
    gate: Tensor  # [E, D]
    w1: Any  # [E, H, D], gated [E, 2 H, D]; a list of [H, D] for rows that have one per expert
    w2: Any  # [E, D, H]
    gate_bias: Tensor | None = None  # [E]
    b1: Any = None  # [E, H]
    b2: Any = None  # [E, D]
    module: nn.Module | None = None  # of a row that is one

    def leaves(self):
        """What gets a gradient, each only once."""
        tensors = [self.x, self.shift]
        if self.module is not None:
            tensors += self.module.parameters()
        else:
            for part in (self.gate, self.gate_bias, self.w1, self.w2, self.b1, self.b2):
                tensors += part if isinstance(part, list) else [part]
        return [tensor for tensor in tensors if tensor is not None]


def layer_of(activation, S, T, D, H, E, k, dtype, device):
    """The same numbers for every row."""
    torch.manual_seed(0)
    rows = 2 * H if activation == "swiglu" else H
    shapes = {"x": (T, D), "gate": (E, D), "w1": (E, rows, D), "w2": (E, D, H)}
    if activation == "gelu":
        shapes |= {"gate_bias": (E,), "b1": (E, rows), "b2": (E, D)}
    scales = {"gate": D**-0.5, "w1": D**-0.5, "w2": H**-0.5}
    made = {
        name: (torch.randn(shape) * scales.get(name, 1)).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    shift = None
    if S > 1:
        shift = (torch.randn(S, D) / 2).to(device, dtype).requires_grad_()
    return Layer(activation, k, shift=shift, **made)


def per_expert(layer):
    """A parameter per expert, as in a ModuleList: slices of a stack would pay for its gradient."""
    for name in ("w1", "w2", "b1", "b2"):
        if (stacked := getattr(layer, name)) is not None:
            setattr(layer, name, [part.detach().clone().requires_grad_() for part in stacked])
    return layer


def act(layer, h):
    if layer.activation == "gelu":
        return F.gelu(h)
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def expert(layer, e, u):
    biases = (None, None) if layer.b1 is None else (layer.b1[e], layer.b2[e])
    return F.linear(act(layer, F.linear(u, layer.w1[e], biases[0])), layer.w2[e], biases[1])


def route(layer, u):
    """Weights and ids [R, k]."""
    p = F.linear(u, layer.gate, layer.gate_bias).softmax(-1, dtype=torch.float32)
    return p.topk(layer.k)


def streams(layer):
    """The rows of all streams, [S T, D]."""
    return layer.x if layer.shift is None else torch.cat([layer.x + row for row in layer.shift])


def all_experts(layer):
    """As M3-JEPA's authors have it: every expert on every token, stream after stream."""
    done = []
    for u in [layer.x] if layer.shift is None else [layer.x + row for row in layer.shift]:
        weights, ids = route(layer, u)
        y = torch.stack([expert(layer, e, u) for e in range(len(layer.w1))], 1)  # [T, E, D]
        y = y.gather(1, ids[..., None].expand(-1, -1, y.shape[2]))
        done.append((y * weights[..., None].to(y.dtype)).sum(1))
    return torch.cat(done)


def loop(layer):
    """Sorted once, then two products per expert."""
    u = streams(layer)
    weights, ids = route(layer, u)
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=len(layer.w1)).tolist()
    out = torch.zeros_like(u)
    for e, slots in enumerate(order.split(counts)):
        if len(slots):
            rows = slots // layer.k
            y = expert(layer, e, u[rows]) * weights.flatten()[slots, None].to(u.dtype)
            out = out.index_add(0, rows, y)
    return out


def torch_grouped_mm(layer):
    """Sort, gather, two grouped products of torch, and the sum over slots."""
    u = streams(layer)
    weights, ids = route(layer, u)
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).to(order))
    counts = torch.zeros(len(layer.w1), dtype=torch.int32, device=flat.device)
    offs = counts.index_add(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0)
    product = PRODUCTS[u.dtype == torch.bfloat16]
    h = product(u[order // layer.k], layer.w1.mT, offs.int())
    if layer.b1 is not None:
        h = h + layer.b1[flat[order]]
    y = product(act(layer, h), layer.w2.mT, offs.int())
    if layer.b2 is not None:
        y = y + layer.b2[flat[order]]
    y = y[inverse].view(*ids.shape, -1)
    return (y * weights[..., None].to(y.dtype)).sum(1)


def transformers_grouped_mm(layer):
    """The experts that Hugging Face transformers uses unless told otherwise."""
    from transformers.integrations import moe

    experts = SimpleNamespace(
        num_experts=len(layer.gate), has_gate=layer.activation == "swiglu", is_transposed=False,
        has_bias=layer.b1 is not None, has_post_expert_norm=False, _is_expert_parallel=False,
        gate_up_proj=layer.w1, up_proj=layer.w1, up_proj_bias=layer.b1, down_proj=layer.w2,
        down_proj_bias=layer.b2, act_fn=F.gelu, _apply_gate=lambda h: act(layer, h),
    )  # fmt: skip
    u = streams(layer)
    weights, ids = route(layer, u)
    return moe.grouped_mm_experts_forward(experts, u, ids, weights.to(u.dtype))


def liger(layer):
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    u = streams(layer)
    weights, ids = route(layer, u)
    return LigerFusedMoEFunction.apply(u, layer.w1, layer.w2, ids.int(), weights.to(u.dtype))


def scattermoe(layer):
    weights, ids = route(layer, layer.x)
    return layer.module.experts(layer.x, weights.to(layer.x.dtype), ids)


def with_scattermoe(layer):
    """Its module with the layer's weights; its up rows come first."""
    from scattermoe.mlp import GLUMLP

    E, _, H = layer.w2.shape
    experts = GLUMLP(layer.x.shape[1], H, E, layer.k).to(layer.x)
    with torch.no_grad():
        experts.experts.weight.copy_(layer.w1.roll(H, 1))
        experts.output_experts.weight.copy_(layer.w2)
    layer.gate = nn.Parameter(layer.gate.detach())
    layer.module = nn.ModuleDict({"experts": experts})
    layer.module.register_parameter("gate", layer.gate)
    return layer


def ours(layer):
    out, _ = layer.module(layer.x, shift=layer.shift)
    return out.flatten(0, -2)


def with_moe(layer):
    """nn.MoE with the layer's parameters, without the sums that no other row makes."""
    E, D, H = layer.w2.shape
    biases = layer.b1 is not None
    quiet = {"return_entropy": False, "return_probs_sum": False}
    # On "meta" nothing is drawn: the parameters are put in place of its own.
    router = TopKRouter(D, E, layer.k, bias=biases, device="meta", **quiet)
    experts = GroupedExperts(E, D, H, bias=biases, activation=layer.activation, device="meta")
    router.weight, experts.w1, experts.w2 = map(nn.Parameter, (layer.gate, layer.w1, layer.w2))
    if biases:
        router.bias, experts.b1, experts.b2 = map(
            nn.Parameter, (layer.gate_bias, layer.b1, layer.b2)
        )
    layer.module = MoE(router, experts)
    return layer


def as_it_is(layer):
    return layer


def rows_on(device, activation, S):
    """{name: (function of a layer, what makes the layer fit it)} of what can run here."""
    rows = {
        "all experts": (all_experts, per_expert),
        "eager loop": (loop, per_expert),
        "grouped_mm": (torch_grouped_mm, as_it_is),
        "compile": (torch.compile(torch_grouped_mm, dynamic=False), as_it_is),
    }
    peers = {"transformers": (transformers_grouped_mm, as_it_is)}
    if device == "cuda" and activation == "swiglu" and S == 1:  # all that these two have
        peers |= {"liger_kernel": (liger, as_it_is), "scattermoe": (scattermoe, with_scattermoe)}
    rows |= {name: peer for name, peer in peers.items() if importlib.util.find_spec(name)}
    return rows | {OURS: (ours, with_moe)}
