"""What info_nce_loss does around its op: check the arguments, and reduce the losses of the rows."""

from collections.abc import Callable
from typing import Any

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
from m2ae_kernels.ops._contrastive_pairs import Pairing, check_pairing, check_rows
from m2ae_kernels.ops._info_nce_loss_reduction import (
    metrics_of,
    reduce,
    smoothing,
    weights_of_keys,
)
from m2ae_kernels.ops._plain import accumulator

KEPT = 64 << 20  # bytes of logits that the CPU rather keeps than computes twice


def info_nce_loss_of(
    rows: Callable[..., tuple[Tensor, ...]],
    query: Tensor,
    key: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    target: Tensor | None,
    target_offset: int,
    ignore_index: int,
    symmetric: bool,
    normalize: bool,
    eps: float,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same_id: str,
    exclude_self: bool,
    label_smoothing: float,
    weight: Tensor | None,
    reduction: str,
    return_metrics: bool,
    allow_tf32: bool | None,
    max_workspace_bytes: int | None,
) -> Any:
    """The loss, by `rows`: the registered op, or its reference, which makes the losses per row."""
    op = "info_nce_loss"
    query, key = features(op, query, key)
    N, M, device = query.shape[0], key.shape[0], query.device
    check_options(op, eps, reduction, max_workspace_bytes)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: expected label_smoothing in [0, 1), got {label_smoothing}")
    rows_of = (target, query_mask, key_mask, query_ids, key_ids)
    options = (target_offset, ignore_index, same_id, exclude_self)
    pairing = check_pairing(op, N, M, device, *rows_of, *options)
    check_rows(op, "weight", weight, "N", N, FLOATING, device)
    logit_scale = number(op, "logit_scale", logit_scale, accumulator(query.dtype), device)
    workspace = WORKSPACE if max_workspace_bytes is None else max_workspace_bytes
    outputs = rows(
        *(query, key, logit_scale, *pairing, normalize, eps, symmetric, return_metrics),
        _keep(query, key, logit_scale, workspace),
        use_tf32(query, allow_tf32),
        workspace,
    )
    loss_q, loss_k, num_q, num_k = outputs[0], outputs[1], outputs[6], outputs[7]
    if logit_bias is not None:
        bias = number(op, "logit_bias", logit_bias, loss_q.dtype, device)
        nothing = bias.reshape(1)[:0].sum()  # 0, whatever the bias is, with gradient 0
        loss_q, loss_k = loss_q + nothing, loss_k + nothing
    if label_smoothing > 0:
        given = (normalize, eps, label_smoothing, symmetric)
        added_q, added_k = smoothing(query, key, logit_scale, pairing, *given)
        loss_q = loss_q + torch.where(num_q > 0, added_q, 0)
        if added_k is not None:
            loss_k = loss_k + torch.where(num_k > 0, added_k, 0)
    loss = _reduced(loss_q, loss_k, num_q, num_k, weight, pairing, symmetric, reduction)
    return (loss, metrics_of(outputs, symmetric)) if return_metrics else loss


def _reduced(
    loss_q: Tensor,
    loss_k: Tensor,
    num_q: Tensor,
    num_k: Tensor,
    weight: Tensor | None,
    pairing: Pairing,
    symmetric: bool,
    reduction: str,
) -> Any:
    weight_k = None
    if weight is not None:
        weight = weight.to(loss_q.dtype)
        weight_k = weights_of_keys(weight, pairing, loss_k.shape[0]) if symmetric else None
    of_queries = reduce(loss_q, num_q, weight, reduction)
    of_keys = reduce(loss_k, num_k, weight_k, reduction) if symmetric else None
    if reduction == "none":
        return of_queries, of_keys
    return of_queries if of_keys is None else (of_queries + of_keys) / 2


def _keep(query: Tensor, key: Tensor, logit_scale: Tensor, workspace: int) -> bool:
    if query.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    if not (query.requires_grad or key.requires_grad or logit_scale.requires_grad):
        return False
    fits = 4 * query.shape[0] * key.shape[0] <= min(KEPT, workspace)
    if torch.compiler.is_compiling():  # a graph for any N and M does not depend on them
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return bool(statically_known_true(fits))
    return fits
