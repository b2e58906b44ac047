"""MoERouting: where the rows of each token go when they are sorted by expert."""

from typing import NamedTuple

from torch import Tensor


class MoERouting(NamedTuple):
    """What moe_sort returns, for R rows of the routing, k experts each, E experts, N sorted rows.

    A slot is one of the k choices of a row: slot id r * k + j. Everything is int32.
    """

    sorted_ids: Tensor  # [N], sorted row -> slot id; -1 for padding and the unused tail
    inverse_ids: Tensor  # [R, k], slot -> sorted row; -1 if dropped or masked
    expert_offsets: Tensor  # [E + 1], first row of each expert, padding included; the last: all
    tokens_per_expert: Tensor  # [E], rows kept per expert, without padding
