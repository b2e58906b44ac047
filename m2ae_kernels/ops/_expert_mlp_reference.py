"""expert_mlp in plain PyTorch, forward and backward. Math and letters: expert_mlp.py

It serves every device without a kernel of its own, so it does not wait for one: rows go through the
experts in blocks (_moe_blocks.py), at up to twice the arithmetic of the rows themselves, with a
copy of the weights of up to 2 E experts, in float32 for every dtype, and with padded temporaries of
the size of h and of the sorted rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from m2ae_kernels.ops._activations import IDENTITY, activate, activate_backward
from m2ae_kernels.ops._moe_blocks import RowBlocks, of_experts, row_blocks, sum_by_expert, take
from m2ae_kernels.ops._philox import HIDDEN, OUTPUT, dropout_factors
from m2ae_kernels.ops._plain import accumulator, without_autocast

AT_OUTPUT, AT_INPUT, NOWHERE = range(3)  # where the router weight is applied


class _Plan(NamedTuple):
    """Which slot each of the B n entries of the blocks computes, and with what."""

    blocks: RowBlocks
    slots: Tensor  # [B, n], slot id; R k for none
    row: Tensor  # [B, n], row of the routing; R for none
    token: Tensor  # [B, n], row of x; T for none
    stream: Tensor  # [B, n], row of shift; S for none
    place_of_slot: Tensor  # [R, k], entry of each slot; B n for none
    hidden_factors: Tensor | None  # [B, n, H], of the dropout
    output_factors: Tensor | None  # [B, n, Do]


def _plan(
    x: Tensor,  # [T, D]
    w2: Tensor,  # [E, Do, H]
    shift: Tensor | None,  # [S, D]
    seed: Tensor | None,  # [2]
    sorted_ids: Tensor,  # [N]
    inverse_ids: Tensor,  # [R, k]
    expert_offsets: Tensor,  # [E + 1]
    dropout_p: float,
    output_dropout_p: float,
) -> _Plan:
    (R, k), (T, _) = inverse_ids.shape, x.shape
    S = 1 if shift is None else len(shift)
    blocks = row_blocks(expert_offsets, len(sorted_ids))
    ids = F.pad(sorted_ids.long(), (0, 1), value=-1)[blocks.rows]
    is_slot = ids >= 0
    row = torch.where(is_slot, ids // k, R)
    places = F.pad(blocks.place, (0, 1), value=blocks.rows.numel())
    factors: list[Tensor | None] = [None, None]
    acc = accumulator(x.dtype)
    given = ((dropout_p, w2.shape[2], HIDDEN), (output_dropout_p, w2.shape[1], OUTPUT))
    for i, (p, columns, which) in enumerate(given):
        if p > 0 and seed is not None:
            factors[i] = dropout_factors(seed, ids.clamp(min=0), columns, p, which, acc)
    return _Plan(
        blocks,
        torch.where(is_slot, ids, R * k),
        row,
        torch.where(is_slot, row % max(T, 1), T),
        torch.where(is_slot, row // max(T, 1), S),
        places[torch.where(inverse_ids >= 0, inverse_ids, len(sorted_ids)).long()],
        *factors,
    )


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, blocks: RowBlocks) -> Tensor:
    """Rows [B, n, K] times the transposed weight [E, C, K] of each block's expert: [B, n, C]."""
    product = rows @ of_experts(weight.to(rows.dtype), blocks).mT
    return (
        product if bias is None else product + of_experts(bias.to(rows.dtype), blocks)[:, None, :]
    )


def _times(values: Tensor, factors: Tensor | None) -> Tensor:
    return values if factors is None else values * factors


def _inputs(x: Tensor, shift: Tensor | None, plan: _Plan) -> Tensor:
    """x[t] + shift[s] of each entry, [B, n, D]; zeros where there is none."""
    acc = accumulator(x.dtype)
    rows = take(x.to(acc), plan.token)
    return rows if shift is None else rows + take(shift.to(acc), plan.stream)


def _weights(topk_weights: Tensor, plan: _Plan, dtype: torch.dtype) -> Tensor:
    """The router weight of each entry, [B, n, 1]; 0 where there is none."""
    return take(topk_weights.to(dtype).reshape(-1, 1), plan.slots)


def _by_slot(of_entries: Tensor, plan: _Plan) -> Tensor:
    """[B, n, C] to [R, k, C]; zeros for a slot that is nowhere."""
    return take(of_entries.flatten(0, 1), plan.place_of_slot)


def forward(
    x: Tensor,  # [T, D]
    w1: Tensor,  # [E, H or 2 H, D]
    w2: Tensor,  # [E, Do, H]
    topk_weights: Tensor,  # [R, k]
    b1: Tensor | None,  # [E, H or 2 H]
    b2: Tensor | None,  # [E, Do]
    shift: Tensor | None,  # [S, D]
    seed: Tensor | None,  # [2]
    sorted_ids: Tensor,  # [N]
    inverse_ids: Tensor,  # [R, k]
    expert_offsets: Tensor,  # [E + 1]
    activation: int,
    output_activation: int,
    dropout_p: float,
    output_dropout_p: float,
    weight_at: int,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    routing = (sorted_ids, inverse_ids, expert_offsets)
    with without_autocast(x.device):
        plan = _plan(x, w2, shift, seed, *routing, dropout_p, output_dropout_p)
        u = _inputs(x, shift, plan)
        if weight_at == AT_INPUT:
            u = u * _weights(topk_weights, plan, acc)
        h = _linear(u, w1, b1, plan.blocks).to(x.dtype)
        a = _times(activate(h.to(acc), activation), plan.hidden_factors)
        y = _linear(a, w2, b2, plan.blocks)
        if output_activation != IDENTITY:
            y = y.to(x.dtype)
        z = _times(activate(y.to(acc), output_activation), plan.output_factors)
        of_slots = _by_slot(z, plan)  # [R, k, Do]
        if weight_at == AT_OUTPUT:
            # A slot that is nowhere counts 0, whatever its weight.
            kept = (inverse_ids >= 0)[..., None]
            of_slots = of_slots * torch.where(kept, topk_weights.to(acc)[..., None], 0)
        out = of_slots.new_zeros(of_slots.shape[::2])
        for j in range(of_slots.shape[1]):  # in this order, as every kernel
            out = out + of_slots[:, j]
        empty = x.new_empty(0)
        saves_y = saves and output_activation != IDENTITY
        return (
            out.to(x.dtype),
            _sorted(h, sorted_ids, plan) if saves else empty,
            _sorted(y, sorted_ids, plan) if saves_y else empty.clone(),
        )


def _sorted(of_entries: Tensor, sorted_ids: Tensor, plan: _Plan) -> Tensor:
    """[B, n, C] to [N, C]; zeros for a row without a slot."""
    place = torch.where(sorted_ids >= 0, plan.blocks.place, plan.blocks.rows.numel())
    return take(of_entries.flatten(0, 1), place)


def _saved(rows: Tensor, sorted_ids: Tensor, plan: _Plan) -> Tensor:
    """[N, C] to [B, n, C]. Rows without a slot are not read, and may hold anything."""
    acc = accumulator(rows.dtype)
    clean = torch.where((sorted_ids >= 0)[:, None], rows.to(acc), 0)
    return take(clean, plan.blocks.rows)


def _by_output(
    grad: Tensor,  # [R, Do]
    y: Tensor | None,  # [B, n, Do]; None without an activation
    output_activation: int,
    plan: _Plan,
) -> tuple[Tensor, Tensor]:
    """The gradient by y, [B, n, Do], and that by the router weight where y is known, [B, n, 1]."""
    g = _times(take(grad, plan.row), plan.output_factors)
    if y is None:
        return g, g.new_zeros(*g.shape[:2], 1)
    by_weight = (g * activate(y, output_activation)).sum(-1, keepdim=True)
    return activate_backward(g, y, output_activation), by_weight


def backward(
    grad: Tensor,  # [R, Do]
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    sorted_ids: Tensor,
    inverse_ids: Tensor,
    expert_offsets: Tensor,
    h: Tensor,  # [N, H or 2 H], or [0]: computed again
    y: Tensor,  # [N, Do] or [0]
    activation: int,
    output_activation: int,
    dropout_p: float,
    output_dropout_p: float,
    weight_at: int,
    output_mask: list[bool],  # of x, w1, w2, topk_weights, b1, b2, shift
) -> tuple[Tensor, ...]:
    acc, E = accumulator(x.dtype), len(w1)
    routing = (sorted_ids, inverse_ids, expert_offsets)
    with without_autocast(x.device):
        plan = _plan(x, w2, shift, seed, *routing, dropout_p, output_dropout_p)
        weight = _weights(topk_weights, plan, acc)
        u = _inputs(x, shift, plan)
        if h.dim() == 1:
            h = _linear(u * weight if weight_at == AT_INPUT else u, w1, b1, plan.blocks)
            h = h.to(x.dtype).to(acc)
        else:
            h = _saved(h, sorted_ids, plan)
        a = _times(activate(h, activation), plan.hidden_factors)
        outputs = None if output_activation == IDENTITY else _saved(y, sorted_ids, plan)
        g, by_weight = _by_output(grad.to(acc), outputs, output_activation, plan)
        by_a = g @ of_experts(w2.to(acc), plan.blocks)  # [B, n, H], yet without the weight
        if output_activation == IDENTITY:  # the output of the experts is not needed for this
            by_weight = (by_a * a).sum(-1, keepdim=True)
            if b2 is not None:
                bias = of_experts(b2.to(acc), plan.blocks)[:, None, :]
                by_weight = by_weight + (g * bias).sum(-1, keepdim=True)
        if weight_at == AT_OUTPUT:
            by_a, g = by_a * weight, g * weight
        by_h = activate_backward(_times(by_a, plan.hidden_factors), h, activation)
        by_u = by_h @ of_experts(w1.to(acc), plan.blocks)  # [B, n, D]
        if weight_at == AT_INPUT:
            by_weight = (by_u * u).sum(-1, keepdim=True)
            by_u, u = by_u * weight, u * weight
        if weight_at == NOWHERE:
            by_weight = torch.zeros_like(weight)
        of_rows = _by_slot(by_u, plan).sum(1)  # [R, D]
        S = 1 if shift is None else len(shift)
        of_rows = of_rows.unflatten(0, (S, len(x)))  # [S, T, D]
        made = (
            of_rows.sum(0),
            sum_by_expert(by_h.mT @ u, plan.blocks, E),
            sum_by_expert(g.mT @ a, plan.blocks, E),
            _by_slot(by_weight, plan).squeeze(-1),
            sum_by_expert(by_h.sum(1), plan.blocks, E),
            sum_by_expert(g.sum(1), plan.blocks, E),
            of_rows.sum(1),
        )
    inputs = (x, w1, w2, topk_weights, b1, b2, shift)
    return tuple(
        value.to(tensor.dtype) if need and tensor is not None else x.new_empty(0)
        for value, tensor, need in zip(made, inputs, output_mask, strict=True)
    )
