"""What topk_gating accepts, and the registered op's arguments made of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m2ae_kernels.ops._checks import expect_device, expect_dtype
from m2ae_kernels.ops._topk_gating_reference import SIGMOID, SOFTMAX, SQRTSOFTPLUS

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCORE_FUNCTIONS = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "sqrtsoftplus": SQRTSOFTPLUS}
_GROUP_SCORES = {"max": 1, "top2_sum": 2}
_MAX_EXPERTS = 1024


def topk_gating_of(
    op: Callable[..., tuple[Tensor, ...]],
    logits: Tensor,
    top_k: int,
    score_function: str,
    norm_topk_prob: bool,
    expert_bias: Tensor | None,
    n_group: int,
    topk_group: int,
    group_score: str | int,
    routed_scaling_factor: float,
    logit_shift: Tensor | None,
    token_mask: Tensor | None,
    return_entropy: bool,
    return_probs_sum: bool,
    nan_policy: str,
) -> tuple[Any, ...]:
    """Check the arguments, flatten the tokens, call `op`; None for what was not asked for."""
    _check_logits(logits)
    groups = _groups(logits.shape[-1], top_k, n_group, topk_group, group_score)
    if score_function not in _SCORE_FUNCTIONS:
        raise ValueError(
            'topk_gating: expected score_function "softmax", "sigmoid" or "sqrtsoftplus", got'
            f" {score_function!r}"
        )
    if nan_policy not in ("propagate", "zero"):
        raise ValueError(
            f'topk_gating: expected nan_policy "propagate" or "zero", got {nan_policy!r}'
        )
    _check_tensors(logits, expert_bias, logit_shift, token_mask)
    weights, ids, logsumexp, entropy, probs_sum, tokens_per_expert = op(
        logits.flatten(0, -2) if logits.dim() > 1 else logits[None],  # [T, E]
        logit_shift,
        expert_bias,
        None if token_mask is None else token_mask.flatten(),
        top_k,
        _SCORE_FUNCTIONS[score_function],
        norm_topk_prob,
        *groups,
        routed_scaling_factor,
        return_entropy,
        return_probs_sum,
        nan_policy == "zero",
    )
    asked = (entropy if return_entropy else None, probs_sum if return_probs_sum else None)
    return weights, ids, logsumexp, *asked, tokens_per_expert


def _check_logits(logits: Tensor) -> None:
    expect_dtype("topk_gating", "logits", logits, _FLOATING)
    if logits.dim() == 0:
        raise ValueError("topk_gating: expected logits [..., E], got one number")
    E = logits.shape[-1]
    if E > _MAX_EXPERTS:
        raise ValueError(f"topk_gating: expected E <= {_MAX_EXPERTS} experts, got {E}")


def _groups(
    E: int, top_k: int, n_group: int, topk_group: int, group_score: str | int
) -> tuple[int, int, int]:
    """n_group, topk_group and how many experts make the score of a group; 1, 1, 1 without limit."""
    if not 1 <= top_k <= E:
        raise ValueError(f"topk_gating: expected 1 <= top_k <= E = {E}, got {top_k}")
    if n_group < 1 or E % n_group != 0:
        raise ValueError(f"topk_gating: expected n_group to divide E = {E}, got {n_group}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(
            f"topk_gating: expected 1 <= topk_group <= n_group = {n_group}, got {topk_group}"
        )
    best = _GROUP_SCORES.get(group_score) if isinstance(group_score, str) else group_score
    if best is None or best < 1:
        raise ValueError(
            'topk_gating: expected group_score "max", "top2_sum" or a number >= 1, got'
            f" {group_score!r}"
        )
    if n_group == 1:
        return 1, 1, 1
    size = E // n_group
    if best > size:
        raise ValueError(
            f"topk_gating: expected group_score of at most the E / n_group = {size} experts of a"
            f' group, got {group_score!r}; "max" suits any group'
        )
    if top_k > topk_group * size:
        raise ValueError(
            "topk_gating: expected top_k <= topk_group * E / n_group ="
            f" {topk_group} * {E} / {n_group} = {topk_group * size}, got {top_k}"
        )
    return (1, 1, 1) if topk_group == n_group else (n_group, topk_group, best)


def _check_tensors(
    logits: Tensor, expert_bias: Tensor | None, logit_shift: Tensor | None, mask: Tensor | None
) -> None:
    if expert_bias is None and logit_shift is None and mask is None:
        return
    leading, E = logits.shape[:-1], logits.shape[-1]
    wide = (torch.float64,) if logits.dtype == torch.float64 else ()
    if expert_bias is not None:
        if expert_bias.shape != (E,):
            raise ValueError(
                f"topk_gating: expected expert_bias [E = {E}], got {list(expert_bias.shape)}"
            )
        expect_dtype("topk_gating", "expert_bias", expert_bias, (torch.float32, *wide))
    if logit_shift is not None:
        if logit_shift.dim() != 2 or logit_shift.shape[1] != E:
            raise ValueError(
                f"topk_gating: expected logit_shift [S, E = {E}], got {list(logit_shift.shape)}"
            )
        expect_dtype("topk_gating", "logit_shift", logit_shift, (*_FLOATING[:3], *wide))
    if mask is not None:
        if mask.shape not in (leading, (leading.numel(),)):
            raise ValueError(
                f"topk_gating: expected token_mask [T = {leading.numel()}], got {list(mask.shape)}"
            )
        expect_dtype("topk_gating", "token_mask", mask, (torch.bool,))
    given = {"expert_bias": expert_bias, "logit_shift": logit_shift, "token_mask": mask}
    for name, tensor in given.items():
        expect_device("topk_gating", name, tensor, "logits", logits.device)
