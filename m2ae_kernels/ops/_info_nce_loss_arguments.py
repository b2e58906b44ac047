"""What info_nce_loss does outside its op: check the arguments, reduce the losses of the rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m2ae_kernels.ops._checks import expect_default, expect_device, expect_dtype
from m2ae_kernels.ops._info_nce_loss_pairs import anchors
from m2ae_kernels.ops._plain import accumulator, autocast_dtype

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NOT_YET = {  # and the default, which alone is taken
    "query_ids": None,
    "key_ids": None,
    "same_id": "negative",
    "exclude_self": False,
    "label_smoothing": 0.0,
    "weight": None,
    "return_metrics": False,
    "allow_tf32": None,
    "max_workspace_bytes": None,
}


def expect_supported(*values: object) -> None:
    """Each argument of the signature that the op does not know yet has its default."""
    for (name, default), value in zip(NOT_YET.items(), values, strict=True):
        expect_default("info_nce_loss", name, value, default)


def info_nce_loss_of(
    rows: Callable[..., tuple[Tensor, ...]],
    query: Tensor,
    key: Tensor,
    logit_scale: float | Tensor,
    target: Tensor | None,
    target_offset: int,
    ignore_index: int,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    normalize: bool,
    eps: float,
    symmetric: bool,
    logit_bias: float | Tensor | None,
    reduction: str,
) -> Any:
    """The loss, by `rows`: the registered op, or its reference, which makes the losses per row."""
    query, key = _features(query, key)
    N, M, device = query.shape[0], key.shape[0], query.device
    if not eps > 0:
        raise ValueError(f"info_nce_loss: expected eps > 0, got {eps}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f'info_nce_loss: expected reduction "mean", "sum" or "none", got {reduction!r}'
        )
    _check_rows("query_mask", query_mask, "N", N, torch.bool, device)
    _check_rows("key_mask", key_mask, "M", M, torch.bool, device)
    _check_rows("target", target, "N", N, torch.int64, device)
    if target is None and (target_offset < 0 or target_offset + N > M):
        raise ValueError(
            f"info_nce_loss: expected target_offset + N <= M = {M} without a target, got"
            f" {target_offset} + {N}"
        )
    logit_scale = _number("logit_scale", logit_scale, accumulator(query.dtype), device)
    pairing = (target, target_offset, ignore_index, query_mask, key_mask)
    loss_q, loss_k, *_ = rows(query, key, logit_scale, *pairing, normalize, eps, symmetric)
    if logit_bias is not None:
        bias = _number("logit_bias", logit_bias, loss_q.dtype, device)
        nothing = bias.reshape(1)[:0].sum()  # 0, whatever the bias is, with gradient 0
        loss_q, loss_k = loss_q + nothing, loss_k + nothing
    if reduction == "none":
        return loss_q, loss_k if symmetric else None
    sums = [loss_q.sum(), loss_k.sum()] if symmetric else [loss_q.sum()]
    if reduction == "mean":
        counts = anchors(N, M, device, *pairing)
        sums = [total / count for total, count in zip(sums, counts, strict=False)]
    return sum(sums) / len(sums)


def _features(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    if query.dim() != 2:
        raise ValueError(f"info_nce_loss: expected query [N, D], got {list(query.shape)}")
    if key.dim() != 2 or key.shape[1] != query.shape[1]:
        raise ValueError(
            f"info_nce_loss: expected key [M, D = {query.shape[1]}], got {list(key.shape)}"
        )
    expect_dtype("info_nce_loss", "query", query, FLOATING)
    expect_dtype("info_nce_loss", "key", key, FLOATING)
    expect_device("info_nce_loss", "key", key, "query", query.device)
    asked = autocast_dtype(query.device)
    if asked is not None and torch.float64 not in (query.dtype, key.dtype):
        query, key = query.to(asked), key.to(asked)
    if query.dtype != key.dtype:
        raise TypeError(
            f"info_nce_loss: expected key in the dtype of query, {query.dtype}, got {key.dtype}"
        )
    return query, key


def _check_rows(
    name: str, rows: Tensor | None, letter: str, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    if rows is None:
        return
    if rows.shape != (size,):
        raise ValueError(
            f"info_nce_loss: expected {name} [{letter} = {size}], got {list(rows.shape)}"
        )
    expect_dtype("info_nce_loss", name, rows, (dtype,))
    expect_device("info_nce_loss", name, rows, "query", device)


def _number(
    name: str, number: float | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:  # []
    if not isinstance(number, Tensor):
        return torch.full((), number, dtype=dtype, device=device)
    if number.numel() != 1:
        raise ValueError(
            f"info_nce_loss: expected one number as {name}, got shape {list(number.shape)}"
        )
    expect_dtype("info_nce_loss", name, number, FLOATING)
    expect_device("info_nce_loss", name, number, "query", device)
    return number.reshape(())
