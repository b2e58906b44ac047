"""What patch_embed accepts, and the one form of it that the registered op takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m2ae_kernels.ops._checks import expect_default, expect_device, expect_dtype
from m2ae_kernels.ops._plain import accumulator, autocast_dtype

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def patch_embed_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    keep_idx: Tensor | Sequence[Tensor] | None,
    prefix_tokens: Tensor | None,
    mean: Tensor | Sequence[float] | None,
    std: Tensor | Sequence[float] | None,
    scale: float | None,
    patch_size: Sequence[int] | None,
    data_format: str,
    pad: bool,
    image_idx: Tensor | None,
    out_dtype: torch.dtype | None,
) -> tuple[Any, ...]:
    """Check the arguments of the public function; return those of the op, in the schema's order.

    pos_embed becomes [N, D] or [P + N, D], keep_idx [R, K] of integers, prefix_tokens [P, D], mean
    and std tensors [C]; scale and out_dtype get their values.
    """
    expect_default("patch_embed", "patch_size", patch_size)
    expect_default("patch_embed", "data_format", data_format, "channels_first")
    expect_default("patch_embed", "pad", pad, False)
    expect_default("patch_embed", "image_idx", image_idx)
    _check_image(x, weight)
    B, C, H, W = x.shape
    D, _, kh, kw = weight.shape
    N, P = (H // kh) * (W // kw), 0
    if bias is not None:
        expect_dtype("patch_embed", "bias", bias, (weight.dtype,))
        if bias.shape != (D,):
            raise ValueError(f"patch_embed: expected bias [D = {D}], got {list(bias.shape)}")
    if prefix_tokens is not None:
        prefix_tokens = _table("prefix_tokens", "[P, D] or [1, P, D]", prefix_tokens, D)
        P = prefix_tokens.shape[0]
    if pos_embed is not None:
        pos_embed = _table("pos_embed", "[N, D] or [1, N, D]", pos_embed, D)
        if pos_embed.shape[0] not in (N, P + N):
            raise ValueError(
                f"patch_embed: expected pos_embed of N = {N} patches, or of P + N = {P + N} with"
                f" the prefix tokens, got {pos_embed.shape[0]} rows"
            )
    if keep_idx is not None:
        keep_idx = _indices(keep_idx, B, N)
    dtype = accumulator(x.dtype, weight.dtype)
    mean = _channels("mean", mean, C, dtype, x.device)
    std = _channels("std", std, C, dtype, x.device)
    tensors = {"weight": weight, "bias": bias, "pos_embed": pos_embed, "keep_idx": keep_idx}
    tensors |= {"prefix_tokens": prefix_tokens, "mean": mean, "std": std}
    for name, tensor in tensors.items():
        expect_device("patch_embed", name, tensor, "x", x.device)
    if scale is None:
        scale = 1.0 if x.is_floating_point() else 1 / 255
    if out_dtype is None:
        asked = None if weight.dtype == torch.float64 else autocast_dtype(x.device)
        out_dtype = asked or weight.dtype
    elif out_dtype not in FLOATING:
        raise TypeError(f"patch_embed: expected a floating out_dtype, got {out_dtype}")
    return x, weight, bias, pos_embed, keep_idx, prefix_tokens, mean, std, scale, out_dtype


def _check_image(x: Tensor, weight: Tensor) -> None:
    if x.dim() == 5:
        raise NotImplementedError(
            f"patch_embed: x={list(x.shape)}, which is video, is not supported yet"
        )
    if x.dim() != 4:
        raise ValueError(f"patch_embed: expected x [B, C, H, W], got {list(x.shape)}")
    expect_dtype("patch_embed", "x", x, (torch.uint8, *FLOATING))
    expect_dtype("patch_embed", "weight", weight, FLOATING)
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"patch_embed: expected weight [D, C = {x.shape[1]}, kh, kw], got {list(weight.shape)}"
        )
    (H, W), (kh, kw) = x.shape[2:], weight.shape[2:]
    if H % kh or W % kw:
        raise ValueError(
            f"patch_embed: expected H x W in multiples of the patch, kh x kw = {kh} x {kw},"
            f" got {H} x {W}; resize, crop or pad the images"
        )


def _table(name: str, shapes: str, table: Tensor, D: int) -> Tensor:  # [rows, D]
    expect_dtype("patch_embed", name, table, FLOATING)
    rows = table[0] if table.dim() == 3 and table.shape[0] == 1 else table
    if rows.dim() != 2 or rows.shape[1] != D:
        raise ValueError(
            f"patch_embed: expected {name} {shapes} with D = {D}, got {list(table.shape)}"
        )
    return rows


def _channels(
    name: str,
    numbers: Tensor | Sequence[float] | None,
    C: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:  # [C]
    if numbers is None:
        return None
    if not isinstance(numbers, Tensor):
        if len(numbers) != C:
            raise ValueError(
                f"patch_embed: expected {name} of C = {C} channels, got {len(numbers)} numbers"
            )
        # Filled on the device: a copy to it would wait, and could not be captured in a CUDA graph.
        return torch.stack([torch.full((), x, dtype=dtype, device=device) for x in numbers])
    if numbers.shape != (C,):
        raise ValueError(
            f"patch_embed: expected {name} of C = {C} channels, got shape {list(numbers.shape)}"
        )
    return numbers


def _indices(keep_idx: Tensor | Sequence[Tensor], B: int, N: int) -> Tensor:  # [R, K]
    if isinstance(keep_idx, Tensor):
        kept = _kept(keep_idx, B, N)
        R = kept.shape[0] if kept.dim() == 2 else -1
        if R < 0 or (R % B if B else R) != 0:
            raise ValueError(
                f"patch_embed: expected keep_idx [R, K], R a multiple of B = {B}, got"
                f" {list(kept.shape)}"
            )
        return kept
    masks = [_kept(mask, B, N) for mask in keep_idx]
    shapes = [list(mask.shape) for mask in masks]
    if not masks or any(shape != [B, *shapes[0][1:2]] for shape in shapes):
        raise ValueError(
            f"patch_embed: expected keep_idx as a list of [B, K], B = {B}, one K for all,"
            f" got {shapes}"
        )
    return torch.cat(masks)


def _kept(mask: Tensor, B: int, N: int) -> Tensor:
    """Integers as they are; bool [B, N] as the indices of its True, [B, K]."""
    expect_dtype("patch_embed", "keep_idx", mask, (torch.int32, torch.int64, torch.bool))
    if mask.dtype != torch.bool:
        return mask
    if mask.shape != (B, N):
        raise ValueError(
            f"patch_embed: expected a bool keep_idx [B, N] = [{B}, {N}], got {list(mask.shape)}"
        )
    counts = set(mask.sum(1).tolist())
    if len(counts) > 1:
        raise ValueError(
            f"patch_embed: expected a bool keep_idx with K times True in each row, got"
            f" {min(counts)} to {max(counts)}; drop patches until the counts agree"
        )
    return mask.nonzero()[:, 1].view(B, counts.pop() if counts else 0)
