"""The arguments of expert_mlp as its Triton kernels read them."""

from typing import NamedTuple

from torch import Tensor

from m2ae_kernels.ops._expert_mlp_reference import AT_INPUT, AT_OUTPUT
from m2ae_kernels.ops._philox import HIDDEN, OUTPUT
from m2ae_kernels.triton._grouped_rows import Gather
from m2ae_kernels.triton._grouped_tiles import contiguous_or_none
from m2ae_kernels.triton._philox import Dropout, dropout


class Inputs(NamedTuple):
    """The arguments as kernels read them; of the routing R k slots, N sorted rows."""

    x: Tensor  # [T, D]
    w1: Tensor  # [E, H or 2 H, D], any strides
    w2: Tensor  # [E, Do, H], any strides
    topk_weights: Tensor  # [R, k]
    b1: Tensor | None
    b2: Tensor | None
    shift: Tensor | None
    sorted_ids: Tensor
    inverse_ids: Tensor
    ends: Tensor  # [E]
    hidden: Dropout
    output: Dropout
    weight_at: int

    @property
    def gather(self) -> Gather:
        """How rows of the experts' inputs are made of x."""
        weights = self.topk_weights if self.weight_at == AT_INPUT else None
        return Gather(self.sorted_ids, self.k, max(len(self.x), 1), True, True, self.shift, weights)

    @property
    def k(self) -> int:
        return self.inverse_ids.shape[1]

    @property
    def output_weights(self) -> Tensor | None:
        return self.topk_weights if self.weight_at == AT_OUTPUT else None


def inputs_of(
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
    dropout_p: float,
    output_dropout_p: float,
    weight_at: int,
) -> Inputs:
    seed = contiguous_or_none(seed)
    return Inputs(
        x.contiguous(),
        w1,
        w2,
        topk_weights.contiguous(),
        contiguous_or_none(b1),
        contiguous_or_none(b2),
        contiguous_or_none(shift),
        sorted_ids.contiguous(),
        inverse_ids.contiguous(),
        expert_offsets.contiguous()[1:],
        dropout(seed, dropout_p, HIDDEN),
        dropout(seed, output_dropout_p, OUTPUT),
        weight_at,
    )
