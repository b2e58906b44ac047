"""expert_mlp in Triton. Contract and math: m2ae_kernels/ops/expert_mlp.py

Forward: two grouped products (_grouped_rows.py), of which the first reads the rows of x where they
are, then moe_unpermute. What goes from one product to the next has the dtype of x: h, the activated
rows, each slot's output; nothing but h, and y before an output activation, is kept.
Backward: gradients by the outputs of the experts in sorted order, a product with w2 that makes
gradients by h (_expert_mlp_gradients.py), products over the rows of each expert for w2 and w1
(_grouped_depth.py), a product with w1, and sums over each token's slots by moe_permute's backward.
Nothing waits for the device, and there are no atomics: the same inputs give the same bits.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from m2ae_kernels.ops._activations import IDENTITY, is_glu
from m2ae_kernels.ops._expert_mlp_reference import AT_INPUT, AT_OUTPUT, NOWHERE
from m2ae_kernels.triton._activations import constants_of
from m2ae_kernels.triton._device import is_interpreted, on_device
from m2ae_kernels.triton._expert_mlp_gradients import (
    expert_hidden_gradient_kernel,
    expert_input_gradient_kernel,
    expert_output_gradient_kernel,
    router_gradient_kernel,
)
from m2ae_kernels.triton._expert_mlp_inputs import Inputs, inputs_of
from m2ae_kernels.triton._float64 import reference_for_float64
from m2ae_kernels.triton._grouped_depth import multiply_depth
from m2ae_kernels.triton._grouped_rows import multiply_rows
from m2ae_kernels.triton._grouped_sums import sum_groups
from m2ae_kernels.triton._grouped_tiles import (
    STRIP,
    Table,
    Tile,
    choose_tile,
    lanes_of,
    tiles_of_rows,
)

# The product that makes gradients by h; more is held at its end than by others.
HIDDEN_GRADIENT: Table = {
    ("16-bit", 0): (Tile(16, 64, 64, 4, 1), Tile(64, 64, 64, 4, 1)),
    ("16-bit", 8): (
        Tile(16, 128, 64, 4, 4),
        Tile(32, 128, 64, 4, 4),
        Tile(64, 128, 64, 4, 3),
        Tile(128, 128, 64, 8, 3),
    ),
    ("16-bit", 9): (
        Tile(16, 128, 64, 4, 4),
        Tile(32, 128, 64, 4, 4),
        Tile(64, 128, 64, 4, 4),
        Tile(128, 128, 64, 8, 4),
    ),
    ("16-bit", 10): (
        Tile(16, 128, 64, 4, 4),
        Tile(32, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(128, 64, 64, 8, 4),
    ),
    ("16-bit", 12): (
        Tile(16, 128, 64, 4, 3),
        Tile(32, 128, 64, 4, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(128, 64, 64, 8, 3),
    ),
    ("odd 16-bit", 0): (Tile(16, 64, 64, 4, 1), Tile(64, 64, 64, 4, 1)),
    ("odd 16-bit", 8): (Tile(16, 64, 32, 4, 2), Tile(64, 64, 32, 8, 2)),
    ("tf32", 8): (Tile(16, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(128, 64, 32, 8, 3)),
    ("tf32", 12): (Tile(16, 64, 32, 4, 3), Tile(64, 64, 32, 8, 2)),
    ("float32", 0): (Tile(16, 64, 64, 4, 1), Tile(64, 64, 64, 4, 1)),
    ("float32", 8): (Tile(16, 64, 16, 4, 2), Tile(64, 64, 16, 8, 2)),
}
ROWS, COLUMNS = 64, 32  # of a step of a program that goes over rows without a product
SLOTS, ADDED = 128, 16  # of a program that adds up tiles; tiles at once


@reference_for_float64
def expert_mlp(
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
    """Return out [R, Do], h [N, H or 2 H], y [N, Do]."""
    given = inputs_of(
        x, w1, w2, topk_weights, b1, b2, shift, seed, sorted_ids, inverse_ids, expert_offsets,
        dropout_p, output_dropout_p, weight_at,
    )  # fmt: skip
    N, Do = len(sorted_ids), w2.shape[1]
    saves_y = saves and output_activation != IDENTITY
    h = x.new_empty(N, w1.shape[1]) if saves else None
    y = x.new_empty(N, Do) if saves_y else None
    z = x.new_empty(N, Do)
    in_order = given.gather._replace(reads=False, shift=None, weights=None)
    with on_device(x):
        a = _first_layer(given, activation, h)
        multiply_rows(
            a, w2.mT, z, given.ends, bias=given.b2, h=y, gather=in_order,
            activation=output_activation, rounded=output_activation != IDENTITY,
            dropping=given.output,
        )  # fmt: skip
        del a
        out = torch.ops.m2ae_kernels.moe_unpermute(
            z, given.sorted_ids, given.inverse_ids, given.output_weights, None
        )
    empty = (x.new_empty(0) for _ in range(2))
    return (out, *(next(empty) if t is None else t for t in (h, y)))


@reference_for_float64
def expert_mlp_backward(
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
    """Gradients of x, w1, w2, topk_weights, b1, b2, shift; empty where not asked for."""
    given = inputs_of(
        x, w1, w2, topk_weights, b1, b2, shift, seed, sorted_ids, inverse_ids, expert_offsets,
        dropout_p, output_dropout_p, weight_at,
    )  # fmt: skip
    inputs = (x, w1, w2, topk_weights, b1, b2, shift)
    made = [
        t.new_empty(t.shape) if need and t is not None else None
        for t, need in zip(inputs, output_mask, strict=True)
    ]
    by_x, by_w1, by_w2, by_weights, by_b1, by_b2, by_shift = made
    through_weights = by_weights if weight_at == AT_INPUT else None
    reaches_input = any(t is not None for t in (by_x, by_shift, through_weights))
    with on_device(x):
        g, by_weight = _by_outputs(given, grad, y, output_activation, by_b2)
        if h.dim() == 1:
            h = x.new_empty(len(sorted_ids), w1.shape[1])
            _first_layer(given, activation, h)
        h = h.contiguous()
        by_h, a, shares = _by_hidden(given, g, h, activation, by_b1, by_w2 is not None)
        if by_w2 is not None and a is not None:
            multiply_depth(g, a, by_w2, given.ends)
        del g, a
        if by_w1 is not None:
            multiply_depth(by_h, given.x, by_w1, given.ends, given.gather)
        if reaches_input:
            by_u = x.new_empty(len(sorted_ids), x.shape[1])
            multiply_rows(by_h, w1, by_u, given.ends, rounded=False)
            if weight_at == AT_INPUT:
                by_weight = _by_weighted_inputs(given, by_u)
            if by_x is not None:
                made[0] = _sums_of_slots(by_u, given.inverse_ids, len(x))
            if by_shift is not None:
                of_rows = _sums_of_slots(by_u, given.inverse_ids, len(inverse_ids))
                of_streams = of_rows.view(len(by_shift), len(x), x.shape[1])
                by_shift.copy_(of_streams.sum(1, dtype=torch.float32))
        if by_weights is not None:
            with_shares = weight_at == AT_OUTPUT and output_activation == IDENTITY
            _by_router(given, by_weight, shares if with_shares else None, by_weights)
    return tuple(x.new_empty(0) if t is None else t for t in made)


def _first_layer(given: Inputs, activation: int, h: Tensor | None) -> Tensor:
    """The activated rows, [N, H]; writes h, [N, H or 2 H], if it is there."""
    a = given.x.new_empty(len(given.sorted_ids), given.w2.shape[2])
    multiply_rows(
        given.x, given.w1.mT, a, given.ends, bias=given.b1, h=h, gather=given.gather,
        activation=activation, dropping=given.hidden,
    )  # fmt: skip
    return a


def _by_outputs(
    given: Inputs, grad: Tensor, y: Tensor, output_activation: int, by_b2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return g [N, Do], and what is known of gradients by weights, [N]; write by_b2."""
    (E, Do, _), N = given.w2.shape, len(given.sorted_ids)
    g = given.x.new_empty(N, Do)
    by_weight = g.new_empty(N, dtype=torch.float32)
    tiles = tiles_of_rows(N, E, ROWS)
    parts = None if by_b2 is None else g.new_empty(tiles, Do, dtype=torch.float32)
    seed, threshold, scale, which = given.output
    expert_output_gradient_kernel[(tiles,)](
        grad.contiguous(), None if output_activation == IDENTITY else y.contiguous(), given.b2,
        given.sorted_ids, given.ends, given.output_weights, seed, g, by_weight, parts,
        N, E, Do, given.k, threshold, scale,
        ACTIVATION=constants_of(output_activation)["ACTIVATION"], **which,
        BLOCK_M=ROWS, BLOCK_C=COLUMNS, GROUPS=lanes_of(E), INTERPRETED=is_interpreted(g),
    )  # fmt: skip
    if parts is not None and by_b2 is not None:
        sum_groups(parts, by_b2, given.ends, N, ROWS)
    return g, by_weight


def _by_hidden(
    given: Inputs,
    g: Tensor,  # [N, Do]
    h: Tensor,  # [N, H or 2 H]
    activation: int,
    by_b1: Tensor | None,
    needs_a: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """by_h as h; the weighted activated rows [N, H]; <da', a>, [tiles, N]. Writes by_b1."""
    (E, Do, H), N = given.w2.shape, len(h)
    tile, options = choose_tile(HIDDEN_GRADIENT, ((g, h), (given.w2,)), N, E, H)
    row_tiles, column_tiles = tiles_of_rows(N, E, tile.block_m), triton.cdiv(H, tile.block_n)
    wide = 2 * H if is_glu(activation) else H
    by_h = torch.empty_like(h)
    a = h.new_empty(N, H) if needs_a else None
    floats: dict[str, Any] = {"dtype": torch.float32}
    shares = h.new_empty(column_tiles, N, **floats)
    parts = None if by_b1 is None else h.new_empty(row_tiles, wide, **floats)
    seed, threshold, scale, which = given.hidden
    group, depth, column = given.w2.stride()
    expert_hidden_gradient_kernel[(row_tiles * column_tiles,)](
        g, given.w2, h, given.sorted_ids, given.ends, given.output_weights, seed,
        by_h, a, shares, parts, N, E, Do, H, group, depth, column, threshold, scale,
        GROUPS=lanes_of(E), STRIP=STRIP, **constants_of(activation), **which, **options,
    )  # fmt: skip
    if parts is not None and by_b1 is not None:
        sum_groups(parts, by_b1, given.ends, N, tile.block_m)
    return by_h, a, shares


def _by_weighted_inputs(given: Inputs, by_u: Tensor) -> Tensor:
    """Gradients by the weights of the inputs, [N]; weighs by_u, [N, D], in place."""
    N, D = by_u.shape
    by_weight = by_u.new_empty(N, dtype=torch.float32)
    if N > 0:
        expert_input_gradient_kernel[(triton.cdiv(N, ROWS),)](
            by_u, given.x, given.shift, given.sorted_ids, given.topk_weights, by_weight,
            N, max(len(given.x), 1), D, given.k,
            BLOCK_M=ROWS, BLOCK_C=COLUMNS, INTERPRETED=is_interpreted(by_u),
        )  # fmt: skip
    return by_weight


def _sums_of_slots(by_u: Tensor, inverse_ids: Tensor, rows: int) -> Tensor:
    """The sums of by_u, [N, D], over the slots of each of `rows` rows: [rows, D]."""
    sums = torch.ops.m2ae_kernels.moe_permute_backward
    return sums(by_u, None, inverse_ids, rows, by_u.shape[1], [True, False])[0]


def _by_router(given: Inputs, by_weight: Tensor, shares: Tensor | None, out: Tensor) -> None:
    """Gradients of the router weights, [R, k]."""
    if given.weight_at == NOWHERE:
        out.zero_()
    elif out.numel() > 0:
        router_gradient_kernel[(triton.cdiv(out.numel(), SLOTS),)](
            by_weight, shares, given.inverse_ids, out, out.numel(), len(by_weight),
            0 if shares is None else len(shares), BLOCK=SLOTS, ADDED=ADDED,
        )  # fmt: skip
