"""Routing in the forms that other libraries have it in: vLLM's, and Transformer Engine's maps."""

import torch
from torch import Tensor

from m2ae_kernels.ops._checks import expect_device, expect_dtype
from m2ae_kernels.ops.topk_gating import topk_gating

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDICES = (torch.int32, torch.int64)


def vllm_topk_softmax(
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    indices_type: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """topk_gating with the arguments and results of vLLM's fused_topk, and with a gradient.

    Args:
        gating_output: router scores, [T, E]; float32, bfloat16 or float16.
        topk: k, experts per token.
        renormalize: divide the k weights by their sum.
        indices_type: int32 or int64, of topk_ids; None is int32.

    Returns:
        topk_weights [T, k] float32, differentiable; topk_ids [T, k], the best expert first, equal
        ones by index; token_expert_indices [T, k] int32, j T + t at row t and slot j. NaN among the
        scores counts as -inf, as there.

    Raises:
        ValueError: gating_output is not [T, E], or topk is out of range.
        TypeError: a dtype is not as above.
    """
    if gating_output.dim() != 2:
        raise ValueError(
            f"vllm_topk_softmax: expected gating_output [T, E], got {list(gating_output.shape)}"
        )
    if indices_type not in (None, *_INDICES):
        raise TypeError(
            f"vllm_topk_softmax: expected indices_type int32 or int64, got {indices_type}"
        )
    gating = topk_gating(gating_output, topk, norm_topk_prob=renormalize, nan_policy="zero")
    T = len(gating_output)
    numbers = torch.arange(T * topk, dtype=torch.int32, device=gating_output.device)
    token_expert_indices = numbers.view(topk, T).t().contiguous()
    return gating.topk_weights, gating.topk_ids.to(indices_type), token_expert_indices


def to_routing_map(
    topk_weights: Tensor, topk_ids: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """The dense form of a routing, which Transformer Engine and Megatron-LM take.

    Args:
        topk_weights: [R, k] floating.
        topk_ids: [R, k] int32 or int64, distinct within a row; -1 is an empty slot.
        num_experts: E.

    Returns:
        probs: [R, E] in the dtype of `topk_weights`, 0 where an expert is not chosen;
            differentiable.
        routing_map: [R, E] bool, whether it is.

    Raises:
        ValueError: the shapes differ, or are not [R, k].
        TypeError: a dtype or a device is not as above.
    """
    op = "to_routing_map"
    _expect_rows(op, {"topk_weights": topk_weights, "topk_ids": topk_ids}, "[R, k]")
    expect_dtype(op, "topk_weights", topk_weights, _FLOATING)
    expect_dtype(op, "topk_ids", topk_ids, _INDICES)
    # Empty slots go to a column more, which is cut off.
    columns = torch.where(topk_ids < 0, num_experts, topk_ids).long()
    shape = (len(topk_ids), num_experts + 1)
    probs = topk_weights.new_zeros(shape).scatter(1, columns, topk_weights)
    chosen = torch.zeros(shape, dtype=torch.bool, device=topk_ids.device).scatter(1, columns, True)
    return probs[:, :num_experts], chosen[:, :num_experts]


def from_routing_map(probs: Tensor, routing_map: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """What moe_sort and expert_mlp take, of the dense form of Transformer Engine and Megatron-LM.

    Args:
        probs: [R, E] floating; what is not chosen does not count, and may be anything.
        routing_map: [R, E] bool, or integers that are not 0 where an expert is chosen.
        top_k: k, slots per row; a row that has chosen more keeps those with the largest probs.

    Returns:
        topk_weights: [R, k] float32, the largest first and equal ones by index; 0 in empty slots.
            Differentiable.
        topk_ids: [R, k] int32; -1 in slots that are empty because a row has chosen less.

    Raises:
        ValueError: the shapes differ, or are not [R, E], or top_k is out of range.
        TypeError: a dtype or a device is not as above.
    """
    op = "from_routing_map"
    _expect_rows(op, {"probs": probs, "routing_map": routing_map}, "[R, E]")
    expect_dtype(op, "probs", probs, _FLOATING)
    expect_dtype(op, "routing_map", routing_map, (torch.bool, torch.uint8, torch.int8, *_INDICES))
    if not 1 <= top_k <= probs.shape[1]:
        raise ValueError(f"{op}: expected 1 <= top_k <= E = {probs.shape[1]}, got {top_k}")
    chosen = routing_map != 0
    # What is chosen first, the largest first among that: two stable sorts, so that a NaN or an
    # infinity among the probs cannot be mistaken for what is not chosen.
    by_prob = probs.detach().argsort(dim=1, descending=True, stable=True)
    by_choice = (
        chosen.gather(1, by_prob).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    )
    ids = by_prob.gather(1, by_choice)[:, :top_k]
    filled = chosen.gather(1, ids)
    weights = torch.where(filled, probs.gather(1, ids).to(torch.float32), 0)
    return weights, torch.where(filled, ids, -1).to(torch.int32)


def _expect_rows(op: str, tensors: dict[str, Tensor], letters: str) -> None:
    """Both tensors are on one device, and of one shape with two axes."""
    (first, one), (second, other) = tensors.items()
    expect_device(op, second, other, first, one.device)
    if one.dim() != 2 or one.shape != other.shape:
        raise ValueError(
            f"{op}: expected {first} and {second} {letters}, got {list(one.shape)} and"
            f" {list(other.shape)}"
        )
