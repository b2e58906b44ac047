"""What topk_gating accepts."""

import torch
from torch import Tensor

from m2ae_kernels.ops._checks import expect_default, expect_device, expect_dtype

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_EXPERTS = 1024


def check_topk_gating(
    logits: Tensor,
    top_k: int,
    token_mask: Tensor | None,
    score_function: str,
    not_yet: tuple[object, ...],
    nan_policy: str,
) -> None:
    expect_dtype("topk_gating", "logits", logits, FLOATING)
    if logits.dim() == 0:
        raise ValueError("topk_gating: expected logits [..., E], got one number")
    E = logits.shape[-1]
    if E > MAX_EXPERTS:
        raise ValueError(f"topk_gating: expected E <= {MAX_EXPERTS} experts, got {E}")
    if not 1 <= top_k <= E:
        raise ValueError(f"topk_gating: expected 1 <= top_k <= E = {E}, got {top_k}")
    if score_function not in ("softmax", "sigmoid", "sqrtsoftplus"):
        raise ValueError(
            'topk_gating: expected score_function "softmax", "sigmoid" or "sqrtsoftplus", got'
            f" {score_function!r}"
        )
    expect_default("topk_gating", "score_function", score_function, "softmax")
    defaults = {"expert_bias": None, "n_group": 1, "topk_group": 1, "group_score": "top2_sum"}
    defaults |= {"logit_shift": None}
    for (name, default), value in zip(defaults.items(), not_yet, strict=True):
        expect_default("topk_gating", name, value, default)
    if nan_policy not in ("propagate", "zero"):
        raise ValueError(
            f'topk_gating: expected nan_policy "propagate" or "zero", got {nan_policy!r}'
        )
    if token_mask is not None:
        leading = logits.shape[:-1]
        if token_mask.shape not in (leading, (leading.numel(),)):
            raise ValueError(
                f"topk_gating: expected token_mask [T = {leading.numel()}], got"
                f" {list(token_mask.shape)}"
            )
        expect_dtype("topk_gating", "token_mask", token_mask, (torch.bool,))
        expect_device("topk_gating", "token_mask", token_mask, "logits", logits.device)
