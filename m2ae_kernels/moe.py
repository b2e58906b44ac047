"""What a mixture of experts is trained with, on top of topk_gating; no kernels of its own."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from m2ae_kernels.ops._checks import expect_device, expect_dtype
from m2ae_kernels.ops._plain import accumulator, without_autocast
from m2ae_kernels.ops.topk_gating import TopkGatingOutput, topk_gating

_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def gate_topk(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    *,
    top_k: int,
    shift: Tensor | None = None,
    **gating_options: Any,
) -> TopkGatingOutput:
    """A router: a linear layer in float32, then topk_gating.

    Args:
        x: tokens, [..., D]; float32, bfloat16 or float16.
        gate_weight: [E, D]; any of these dtypes.
        gate_bias: [E]; any of these dtypes.
        top_k: experts per token.
        shift: [S, D]: S routings per token, of x + shift[s]. The product with x is made once:
            shift @ gate_weight.T is the logit_shift of topk_gating.
        gating_options: any other keyword argument of topk_gating. A token that token_mask leaves
            out may hold NaN.

    Returns:
        What topk_gating returns, with gradients to x, gate_weight, gate_bias and shift.

    Precision: operands are taken to float32 first, also under autocast: a router in 16 bits sends
    tokens elsewhere (Fedus et al. 2021, "Switch transformers", section 2.4).

    Raises:
        ValueError: a shape does not fit, or as topk_gating.
        TypeError: a dtype or a device is not as above.
    """
    for name, tensor in {"x": x, "gate_weight": gate_weight, "gate_bias": gate_bias}.items():
        expect_device("gate_topk", name, tensor, "x", x.device)
        if tensor is not None:
            expect_dtype("gate_topk", name, tensor, _FLOATING)
    D = x.shape[-1] if x.dim() > 0 else 0
    if gate_weight.dim() != 2 or gate_weight.shape[1] != D:
        raise ValueError(
            f"gate_topk: expected gate_weight [E, D = {D}], got {list(gate_weight.shape)}"
        )
    E = len(gate_weight)
    if gate_bias is not None and gate_bias.shape != (E,):
        raise ValueError(f"gate_topk: expected gate_bias [E = {E}], got {list(gate_bias.shape)}")
    if shift is not None:
        expect_device("gate_topk", "shift", shift, "x", x.device)
        expect_dtype("gate_topk", "shift", shift, _FLOATING)
        if shift.dim() != 2 or shift.shape[1] != D:
            raise ValueError(f"gate_topk: expected shift [S, D = {D}], got {list(shift.shape)}")
    mask = gating_options.get("token_mask")
    if mask is not None and mask.dtype == torch.bool and mask.numel() == x[..., 0].numel():
        # 0 times the NaN of a masked token would be the gradient of the weight.
        x = torch.where(mask.view(*x.shape[:-1], 1), x, 0)
    with without_autocast(x.device):
        weight = gate_weight.float()
        bias = None if gate_bias is None else gate_bias.float()
        logits = F.linear(x.float(), weight, bias)  # [..., E]
        if shift is not None:
            gating_options["logit_shift"] = F.linear(shift.float(), weight)  # [S, E]
    return topk_gating(logits, top_k, **gating_options)


def load_balancing_loss(
    probs_sum: Tensor, tokens_per_expert: Tensor, num_tokens: int | Tensor, top_k: int
) -> Tensor:
    """The loss that is least, 1, when every expert gets the same share of tokens: E sum_e f_e P_e.

    Args:
        probs_sum: [E], sum over tokens of the router's probabilities; topk_gating returns it.
        tokens_per_expert: [E] int, how many slots chose each expert; no gradient.
        num_tokens: how many rows these count, without masked ones; or a 0-d tensor of that, which
            is read on its device, so that a mask needs no host sync.
        top_k: experts per token.

    Returns:
        E times the sum over experts of f_e = tokens_per_expert[e] / (num_tokens top_k) times P_e =
        probs_sum[e] / num_tokens; a scalar, 0 without tokens.

    Raises:
        ValueError: the two sums are not both [E], num_tokens is negative or no number, top_k < 1.

    Source: Fedus et al. 2021, "Switch transformers", equations 4 to 6.
    """
    if probs_sum.dim() != 1 or tokens_per_expert.shape != probs_sum.shape:
        raise ValueError(
            "load_balancing_loss: expected probs_sum and tokens_per_expert [E], got"
            f" {list(probs_sum.shape)} and {list(tokens_per_expert.shape)}"
        )
    if top_k < 1:
        raise ValueError(f"load_balancing_loss: expected top_k >= 1, got {top_k}")
    if isinstance(num_tokens, Tensor):
        if num_tokens.dim() != 0:
            raise ValueError(
                "load_balancing_loss: expected num_tokens to be a number, got a tensor"
                f" {list(num_tokens.shape)}"
            )
        tokens = num_tokens.to(probs_sum.dtype).clamp(min=1)
    else:
        if num_tokens < 0:
            raise ValueError(f"load_balancing_loss: expected num_tokens >= 0, got {num_tokens}")
        tokens = torch.scalar_tensor(
            max(num_tokens, 1), dtype=probs_sum.dtype, device=probs_sum.device
        )
    share = tokens_per_expert.to(probs_sum.dtype) / (tokens * top_k)
    return len(probs_sum) * (share * (probs_sum / tokens)).sum()


def router_z_loss(logsumexp: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean of logsumexp squared, which keeps the router's logits small.

    Args:
        logsumexp: [R], of the logits of each row; topk_gating returns it.
        token_mask: [T] or [R] bool, R a multiple of T; rows with False do not count, and may be
            NaN. Row s T + t is of token t.

    Returns:
        A scalar, 0 if no row counts.

    Raises:
        ValueError: logsumexp is not [R], or the mask does not fit.
        TypeError: the mask is not bool.

    Source: Zoph et al. 2022, "ST-MoE", equation 5.
    """
    rows = _counted("router_z_loss", "logsumexp", logsumexp, token_mask)
    return _mean(rows.square(), token_mask)


def router_entropy_loss(entropy: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean entropy of the router's distributions, in nats.

    Args:
        entropy: [R], of each row; topk_gating returns it with return_entropy.
        token_mask: [T] or [R] bool, as in router_z_loss.

    Returns:
        A scalar, 0 if no row counts. To minimize it makes the router decide; subtracted from a
        loss, it makes the router explore.

    Raises:
        ValueError: entropy is not [R], or the mask does not fit.
        TypeError: the mask is not bool.
    """
    rows = _counted("router_entropy_loss", "entropy", entropy, token_mask)
    return _mean(rows, token_mask)


def _counted(function: str, name: str, rows: Tensor, token_mask: Tensor | None) -> Tensor:
    """The rows [R], with 0 where the mask is False."""
    if rows.dim() != 1:
        raise ValueError(f"{function}: expected {name} [R], got {list(rows.shape)}")
    rows = rows.to(accumulator(rows.dtype))
    if token_mask is None:
        return rows
    expect_dtype(function, "token_mask", token_mask, (torch.bool,))
    T = token_mask.numel()
    if len(rows) % max(T, 1) != 0 or (T == 0) != (len(rows) == 0):
        raise ValueError(
            f"{function}: expected token_mask [T], T a divisor of R = {len(rows)}, got"
            f" {list(token_mask.shape)}"
        )
    return torch.where(_mask_of_rows(rows, token_mask), rows, 0)


def _mask_of_rows(rows: Tensor, token_mask: Tensor) -> Tensor:
    return token_mask.flatten().repeat(len(rows) // max(token_mask.numel(), 1))


def _mean(rows: Tensor, token_mask: Tensor | None) -> Tensor:
    if token_mask is None:
        return rows.sum() / max(len(rows), 1)
    return rows.sum() / _mask_of_rows(rows, token_mask).sum().clamp(min=1)
