"""Routings to test with, and what the MoE row ops mean, as loops written from the definitions."""

import math

import torch

from m2ae_kernels import MoERouting


def routing_by_loops(ids, E, *, capacity=None, drop_policy="position", weights=None, align=1):
    """MoERouting of nested lists `ids`, one slot after the other."""
    k = len(ids[0]) if ids else 1
    n = len(ids) * k
    chosen_by = [[] for _ in range(E)]  # slots, in ascending order
    for slot in range(n):
        expert = ids[slot // k][slot % k]
        if expert != -1:
            chosen_by[expert].append(slot)

    def preference(slot):
        r, j = divmod(slot, k)
        if drop_policy == "position":
            return (slot,)
        if drop_policy == "slot":
            return (j, r)
        w = weights[r][j]
        return (1, 0.0, slot) if math.isnan(w) else (0, -w, slot)

    for expert in range(E):
        if capacity is not None:
            best = sorted(chosen_by[expert], key=preference)[:capacity]
            chosen_by[expert] = sorted(best)
    most = n + E * (align - 1)
    N = -(-most // align) * align
    sorted_ids, inverse, offsets, count = [-1] * N, [-1] * n, [0], []
    for expert in range(E):
        for i, slot in enumerate(chosen_by[expert]):
            row = offsets[-1] + i
            sorted_ids[row] = slot
            inverse[slot] = row
        count.append(len(chosen_by[expert]))
        offsets.append(offsets[-1] + -(-count[-1] // align) * align)
    shape = (len(ids), k) if ids else (0, 1)
    return MoERouting(
        torch.tensor(sorted_ids, dtype=torch.int32),
        torch.tensor(inverse, dtype=torch.int32).view(shape),
        torch.tensor(offsets, dtype=torch.int32),
        torch.tensor(count, dtype=torch.int32),
    )


def distinct_ids(R, k, E, *, likes=None):
    """[R, k] int32, distinct in a row; `likes` [E] are weights to draw the experts by."""
    likes = torch.ones(E) if likes is None else likes
    if R == 0:
        return torch.empty(0, k, dtype=torch.int32)
    return likes.expand(R, E).multinomial(k).int()


def routings():
    """(name, ids [R, k], E): who is chosen, from nobody to everybody, and by whom."""
    zipf = 1 / torch.arange(1.0, 13.0)
    some = distinct_ids(37, 4, 12)
    masked = some.clone()
    masked[::3] = -1  # rows of a mask
    masked[1, 2] = masked[36, 0] = -1  # experts elsewhere
    yield "usual", some, 12
    yield "first, middle and last empty", distinct_ids(29, 2, 6) * 2 + 1, 15
    yield "all to the first", torch.zeros(21, 1, dtype=torch.int32), 4
    yield "all to the last", torch.full((21, 1), 3, dtype=torch.int32), 4
    yield "k = E", distinct_ids(17, 7, 7), 7
    yield "one expert", torch.zeros(5, 1, dtype=torch.int32), 1
    yield "one row", distinct_ids(1, 3, 8), 8
    yield "no row", distinct_ids(0, 2, 3), 3
    yield "skewed", distinct_ids(300, 4, 12, likes=zipf), 12
    yield "some masked", masked, 12
    yield "all masked", torch.full((9, 2), -1, dtype=torch.int32), 3
    yield "same expert twice", torch.tensor([[1, 1], [0, 1], [2, 2]], dtype=torch.int32), 3
    yield "many experts", distinct_ids(50, 8, 1000), 1000


ROUTINGS = [name for name, _, _ in routings()]


def routing_named(name):
    return next((ids, E) for this, ids, E in routings() if this == name)


def on(device, routing):
    return MoERouting(*(tensor.to(device) for tensor in routing))


def used_rows(routing):
    """[N] bool: the sorted rows that belong to a slot."""
    return routing.sorted_ids >= 0


def sum_by_loops(y, routing, weights, residual):
    """What moe_unpermute returns, [R, D], in float64, slot by slot."""
    inverse = routing.inverse_ids.tolist()
    out = torch.zeros(len(inverse), y.shape[1], dtype=torch.float64)
    for r, places in enumerate(inverse):
        for j, i in enumerate(places):
            if i >= 0:
                w = 1.0 if weights is None else weights[r, j].double()
                out[r] += w * y[i].double()
    return out if residual is None else out + residual.double()
