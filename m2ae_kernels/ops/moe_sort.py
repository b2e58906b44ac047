r"""moe_sort: the order in which rows are sorted by expert, and the way back.

Row r of the routing chose k experts, id[r, j] for j < k; that choice is slot r * k + j. With
n_e the number of slots kept by expert e, and o_e their first place,

    o_0 = 0     o_{e+1} = o_e + ceil(n_e / align) * align

the kept slots of expert e stand at o_e, o_e + 1, ... in ascending order of their number, so that
the order is the stable one by (expert, token, slot) on every device. It is a counting sort: no
comparison of ids, no float, no host sync, and the sizes of all outputs follow from those of the
inputs.

No gradient: the order is piecewise constant.

Kernels: csrc/cpu/moe_sort.cpp on the CPU, csrc/cuda/moe_sort.cu on CUDA (E <= 2,048).
Papers: Lepikhin et al. 2020, "GShard", for capacity and for dropping second choices first; Fedus
et al. 2021, "Switch transformers", for dropping by position; Riquelme et al. 2021, "Scaling vision
with sparse mixture of experts", for dropping by weight; Gale et al. 2022, "MegaBlocks", for rows
sorted by expert instead of a buffer of fixed capacity.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from m2ae_kernels._library import define
from m2ae_kernels.ops._checks import expect_dtype
from m2ae_kernels.ops._moe_arguments import (
    DROP_POLICIES,
    FLOATING,
    check_moe_sort,
    raise_as_value_error,
    sorted_rows,
)
from m2ae_kernels.ops._moe_routing import MoERouting


def moe_sort(
    topk_ids: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: Literal["position", "slot", "prob"] = "position",
    topk_weights: Tensor | None = None,
    align: int = 1,
) -> MoERouting:
    """Sort the slots of a routing by expert, stably.

    Args:
        topk_ids: the experts of each row, [R, k]; int32 or int64, in [0, E). A slot of -1 (masked
            row, expert elsewhere) is skipped. The same expert twice in a row is two slots.
        num_experts: E; at most 2,048 on CUDA.
        capacity: most slots that an expert keeps; None keeps all.
        drop_policy: which slots an expert over capacity keeps. "position": the first in order of
            row, then j; "slot": the first in order of j, then row, so that no second choice takes
            the place of a first; "prob": those of the largest weight, equal ones in order of row,
            then j, NaN last. It changes who is kept, never the order of those kept.
        topk_weights: [R, k] float32, bfloat16 or float16, what "prob" goes by. No gradient.
        align: the rows of each expert are padded to a multiple of it.

    Returns:
        MoERouting of int32, where N = R * k + E * (align - 1), rounded up to a multiple of align:
        sorted_ids: [N], sorted row -> slot; -1 for padding and the unused tail.
        inverse_ids: [R, k], slot -> sorted row; -1 if dropped or skipped.
        expert_offsets: [E + 1], the first row of each expert; `expert_offsets[1:]` is what grouped
            matrix products call offs.
        tokens_per_expert: [E], slots kept per expert, without padding.

    Dropping does not renormalise: divide the weights by their sum over `inverse_ids >= 0` for that.

    Raises:
        ValueError: a shape or a number does not fit; on the CPU also an id outside [-1, E) (where
            compiled: RuntimeError). On CUDA such an id is skipped, as looking for it would stop the
            device.
        TypeError: a dtype or a device is not as above.
    """
    if topk_weights is not None:
        cure = "; m2ae_kernels.reference.moe_sort takes float64"
        expect_dtype("moe_sort", "topk_weights", topk_weights, FLOATING, cure)
    return _sort(_op, topk_ids, num_experts, capacity, drop_policy, topk_weights, align)


def reference(
    topk_ids: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: Literal["position", "slot", "prob"] = "position",
    topk_weights: Tensor | None = None,
    align: int = 1,
) -> MoERouting:
    """What moe_sort means, in plain PyTorch, without shapes that depend on data."""
    return _sort(_reference, topk_ids, num_experts, capacity, drop_policy, topk_weights, align)


def _sort(
    op: Callable[..., tuple[Tensor, ...]],
    topk_ids: Tensor,
    num_experts: int,
    capacity: int | None,
    drop_policy: str,
    topk_weights: Tensor | None,
    align: int,
) -> MoERouting:
    check_moe_sort(topk_ids, num_experts, capacity, drop_policy, topk_weights, align)
    if topk_ids.dtype != torch.int32:
        # An id that int32 does not hold must not wrap around to one that is in range.
        topk_ids = topk_ids.clamp(-2, num_experts).to(torch.int32)
    weights = None
    if drop_policy == "prob" and capacity is not None and topk_weights is not None:
        weights = topk_weights.detach()
        weights = weights if weights.dtype == torch.float64 else weights.float()
    policy = DROP_POLICIES.index(drop_policy)
    try:
        return MoERouting(*op(topk_ids, num_experts, capacity, policy, weights, align))
    except RuntimeError as error:
        raise_as_value_error("moe_sort", error)
        raise


def _reference(
    topk_ids: Tensor,  # [R, k]
    num_experts: int,
    capacity: int | None,
    drop_policy: int,
    topk_weights: Tensor | None,  # [R, k]
    align: int,
) -> tuple[Tensor, ...]:
    E, ids, device = num_experts, topk_ids.flatten().long(), topk_ids.device
    present = (ids >= 0) & (ids < E)
    _refuse_bad_ids(ids, present, E)
    expert = torch.where(present, ids, E)  # skipped slots come last, as an expert of their own
    slots = torch.arange(ids.numel(), device=device)
    if capacity is not None:
        preference = slots  # slots, those to keep first
        if DROP_POLICIES[drop_policy] == "slot":
            preference = slots.view(topk_ids.shape).t().flatten()
        if DROP_POLICIES[drop_policy] == "prob" and topk_weights is not None:
            # Ascending order of the negated weights puts NaN last; 0 - w is the same for both zeros
            preference = (0.0 - topk_weights.flatten()).argsort(stable=True)
        place = _places(expert[preference], E)
        kept = torch.empty_like(present).scatter(0, preference, place < capacity)
        expert = torch.where(kept, expert, E)
    count = _count(expert, E)[:E]
    padded = (count + align - 1) // align * align
    offsets = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
    N = sorted_rows(topk_ids, E, align)
    row = torch.where(expert < E, offsets[expert] + _places(expert, E), N)
    order = torch.full((N + 1,), -1, dtype=torch.int64, device=device).scatter(0, row, slots)[:N]
    inverse = torch.where(row < N, row, -1).view(topk_ids.shape)
    outputs = (order, inverse, offsets, count)
    return tuple(output.to(torch.int32) for output in outputs)


def _count(expert: Tensor, E: int) -> Tensor:
    """[E + 1], how often each of 0..E occurs."""
    zeros = torch.zeros(E + 1, dtype=torch.int64, device=expert.device)
    return zeros.scatter_add(0, expert, torch.ones_like(expert))


def _places(expert: Tensor, E: int) -> Tensor:
    """[n], how many slots before this one have its expert."""
    order = expert.argsort(stable=True)
    start = _count(expert, E).cumsum(0) - _count(expert, E)
    place = torch.arange(expert.numel(), device=expert.device) - start[expert[order]]
    return torch.empty_like(place).scatter(0, order, place)


def _refuse_bad_ids(ids: Tensor, present: Tensor, E: int) -> None:
    """On the CPU alone, where looking at them is no sync; and not while values are yet to come."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = ~present & (ids != -1)
    if bad.any():
        first = ids[bad.int().argmax()]
        raise ValueError(f"moe_sort: expected ids in [-1, E = {E}), got {first}")


def _fake(
    topk_ids: Tensor,
    num_experts: int,
    capacity: int | None,
    drop_policy: int,
    topk_weights: Tensor | None,
    align: int,
) -> tuple[Tensor, ...]:
    N = sorted_rows(topk_ids, num_experts, align)
    sizes = ((N,), topk_ids.shape, (num_experts + 1,), (num_experts,))
    return tuple(topk_ids.new_empty(size, dtype=torch.int32) for size in sizes)


define(
    "moe_sort(Tensor topk_ids, int num_experts, SymInt? capacity, int drop_policy,"
    " Tensor? topk_weights, int align) -> (Tensor sorted_ids, Tensor inverse_ids,"
    " Tensor expert_offsets, Tensor tokens_per_expert)",
    reference=_reference,
    fake=_fake,
)
# Integers have no gradient: without this, every call would pass through a warning hook.
torch.library.impl("m2ae_kernels::moe_sort", "Autograd", torch.library.fallthrough_kernel)
_op = torch.ops.m2ae_kernels.moe_sort.default
