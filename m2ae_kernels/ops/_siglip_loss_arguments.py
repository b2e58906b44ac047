"""What siglip_loss does around its op: check the arguments, divide the weighted sum."""

from collections.abc import Callable

import torch
from torch import Tensor

from m2ae_kernels.ops._contrastive_arguments import (
    FLOATING,
    WORKSPACE,
    check_options,
    features,
    number,
    use_tf32,
)
from m2ae_kernels.ops._contrastive_pairs import check_pairing, check_rows
from m2ae_kernels.ops._plain import accumulator


def siglip_loss_of(
    op: Callable[..., tuple[Tensor, ...]],
    store_gradients: bool,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    target: Tensor | None,
    target_offset: int,
    ignore_index: int,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same_id: str,
    normalize: bool,
    eps: float,
    weight: Tensor | None,
    reduction: str,
    allow_tf32: bool | None,
    max_workspace_bytes: int | None,
) -> Tensor:
    """The loss, by `op`: the registered one, or its reference, which is differentiable itself."""
    name = "siglip_loss"
    names = ("image_features", "text_features")
    image_features, text_features = features(name, image_features, text_features, names)
    N, M, device = image_features.shape[0], text_features.shape[0], image_features.device
    check_options(name, eps, reduction, max_workspace_bytes)
    rows = (target, query_mask, key_mask, query_ids, key_ids)
    options = (target_offset, ignore_index, same_id)
    pairing = check_pairing(name, N, M, device, *rows, *options)
    check_rows(name, "weight", weight, "N", N, FLOATING, device)
    if weight is not None and weight.requires_grad:
        raise ValueError(
            f"{name}: expected weight without requires_grad, as it gets no gradient, got one with"
            " it; pass weight.detach()"
        )
    dtype = accumulator(image_features.dtype)
    scale = number(name, "logit_scale", logit_scale, dtype, device)
    bias = number(name, "logit_bias", logit_bias, dtype, device)
    inputs = (image_features, text_features, scale, bias)
    per_row = reduction == "none"
    stored = store_gradients and not per_row and torch.is_grad_enabled()
    loss = op(
        *inputs,
        *pairing[:5],  # all but what is below, and exclude_self
        weight,
        *(target_offset, ignore_index, pairing.same_id, normalize, eps, per_row),
        [stored and tensor.requires_grad for tensor in inputs],
        use_tf32(image_features, allow_tf32),
        WORKSPACE if max_workspace_bytes is None else max_workspace_bytes,
    )[0]
    return loss / _total(N, query_mask, weight, dtype) if reduction == "mean" else loss


def _total(
    N: int, query_mask: Tensor | None, weight: Tensor | None, dtype: torch.dtype
) -> int | Tensor:
    """What the mean divides by: the number of queries, or the sum of their weights; never 0."""
    if weight is None:
        return max(N, 1) if query_mask is None else query_mask.sum().clamp(min=1)
    weight = weight.to(dtype)
    if query_mask is not None:
        weight = torch.where(query_mask, weight, 0)
    total = weight.sum()
    return torch.where(total != 0, total, 1)
