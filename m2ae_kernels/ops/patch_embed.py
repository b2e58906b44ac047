r"""patch_embed: images to tokens, of the kept patches only, in one op.

Math. B images are cut into N = (H / kh) (W / kw) patches, in row-major order; X[b, n] is patch n of
image b as one row of C kh kw pixels, V [D, C kh kw] the flattened conv weight, P the number of
prefix tokens. Row r of the output belongs to image b = r mod B; its token j < K to patch
n = keep_idx[r, j], or n = j if all are kept.

    x            = (X[b, n] scale - mean) / std
    y[r, P + j]  = V x + bias + pos[n]
    y[r, p]      = prefix[p] (+ the slot of pos for p, if it has one)           for p < P

With g = dy[r, P + j], and sums over all (r, j), or those of them which belong to (b, n):

    dV = sum g x^T    dbias = sum g    dpos[n] = sum_n g    dprefix[p] = sum_r dy[r, p]
    dX[b, n] = scale / std * sum_{b,n} V^T g

A kernel as large as its stride makes a convolution one matrix product, and the patches that are
not kept no part of it: they are never read.

Kernels: none yet; the reference serves every device.
Used by: Dosovitskiy et al. 2021, "An image is worth 16x16 words"; with kept patches He et al. 2022,
"Masked autoencoders are scalable vision learners", and Assran et al. 2023, "I-JEPA".
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m2ae_kernels._library import define
from m2ae_kernels.ops._checks import refuse_forward_mode, refuse_second_derivative
from m2ae_kernels.ops._patch_embed_arguments import patch_embed_arguments
from m2ae_kernels.ops._patch_embed_patches import image_gradient, kept_patches, num_patches
from m2ae_kernels.ops._plain import accumulator, sum_by_index, without_autocast

HALVES = (torch.bfloat16, torch.float16)


def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    keep_idx: Tensor | Sequence[Tensor] | None = None,
    prefix_tokens: Tensor | None = None,
    *,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    scale: float | None = None,
    patch_size: Sequence[int] | None = None,
    data_format: str = "channels_first",
    pad: bool = False,
    image_idx: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Tokens of the kept patches of images: normalize, project, add positions, prepend a prefix.

    Args:
        x: images, [B, C, H, W]; uint8, float32, bfloat16, float16 or float64; any strides. H and W
            are multiples of kh and kw.
        weight: that of the convolution, [D, C, kh, kw]; float32, bfloat16, float16 or float64.
        bias: [D], in the dtype of `weight`.
        pos_embed: added to the patches, [N, D] or [1, N, D]; or [P + N, D] or [1, P + N, D], where
            the first P are added to the prefix tokens. Any of the floating dtypes.
        keep_idx: patches to keep, in [0, N), in any order, also repeated: [R, K] int32 or int64,
            where R is a multiple of B and row r keeps patches of image r mod B. A list of n tensors
            [B, K] is the same as their concatenation, R = n B. Also bool [B, N] with K times True
            in each row, which is read on the host: it waits for a GPU and breaks a compiled graph.
            None keeps all, so that R = B and K = N.
        prefix_tokens: class token, registers, written before the patches of each row; [P, D] or
            [1, P, D], any of the floating dtypes.
        mean: of the channels, [C] numbers or a tensor, in the units of the scaled image ([0, 1] for
            uint8): the op embeds (x * scale - mean) / std. A constant: no gradient. None is 0.
        std: the same for the standard deviation; None is 1.
        scale: factor on the pixels; None is 1/255 for uint8 and 1 otherwise.
        patch_size: for flat weights; not supported yet.
        data_format: of x; not supported yet but for "channels_first".
        pad: for sizes that do not divide; not supported yet.
        image_idx: for a ragged batch; not supported yet.
        out_dtype: dtype of the result; None is the autocast dtype where autocast is on, else the
            dtype of `weight`. A wider `pos_embed` never widens it. Autocast leaves float64 alone.

    Returns:
        Tokens [R, P + K, D], contiguous, in `out_dtype`; differentiable once with respect to
        weight, bias, pos_embed, prefix_tokens and a floating x.

    A patch that is not kept is never read: its NaN reaches neither the tokens nor a gradient, and
    its own gradient is 0. Keeping all N patches in order gives the bits of keep_idx=None.

    Precision: pixels are normalized in float32 (float64 if x or weight is), then rounded to the
    dtype of the product: that of `weight`, or `out_dtype` if only that has 16 bits. Products
    accumulate in float32 or wider; biases and positions are added, then the token is rounded.
    Gradients are summed over tokens in float32 or wider, in the same order every time.

    Raises:
        ValueError: a shape does not fit; H or W does not divide; on the CPU, an index of `keep_idx`
            is outside [0, N) (on a GPU, an assertion of the device).
        TypeError: a dtype or a device is not as above.
        NotImplementedError: video, or an argument that is not supported yet.
    """
    refuse_forward_mode("patch_embed", x, weight, bias, pos_embed, prefix_tokens)
    tensors = (x, weight, bias, pos_embed, keep_idx, prefix_tokens)
    options = (mean, std, scale, patch_size, data_format, pad, image_idx, out_dtype)
    given = (*tensors, *options)
    return _op(*patch_embed_arguments(*given))


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    keep_idx: Tensor | Sequence[Tensor] | None = None,
    prefix_tokens: Tensor | None = None,
    *,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    scale: float | None = None,
    patch_size: Sequence[int] | None = None,
    data_format: str = "channels_first",
    pad: bool = False,
    image_idx: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What patch_embed means, in plain PyTorch: any device, differentiable any number of times."""
    tensors = (x, weight, bias, pos_embed, keep_idx, prefix_tokens)
    options = (mean, std, scale, patch_size, data_format, pad, image_idx, out_dtype)
    given = (*tensors, *options)
    return _reference(*patch_embed_arguments(*given))


def _reference(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [D, C, kh, kw]
    bias: Tensor | None,  # [D]
    pos_embed: Tensor | None,  # [N, D] or [P + N, D]
    keep_idx: Tensor | None,  # [R, K]
    prefix_tokens: Tensor | None,  # [P, D]
    mean: Tensor | None,  # [C]
    std: Tensor | None,  # [C]
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:  # [R, P + K, D]
    dtype = _product_dtype(weight.dtype, out_dtype)
    with without_autocast(x.device):
        patches = kept_patches(x, weight, keep_idx, mean, std, scale).to(dtype)  # [R, K, C kh kw]
        bias = None if bias is None else bias.to(dtype)
        tokens = F.linear(patches, weight.flatten(1).to(dtype), bias)  # [R, K, D]
        slots = None  # of pos_embed, for the prefix tokens
        if pos_embed is not None:
            N = num_patches(x, weight)
            slots, pos = pos_embed.split([pos_embed.shape[0] - N, N])
            tokens = tokens + (pos if keep_idx is None else F.embedding(keep_idx, pos))
        tokens = tokens.to(out_dtype)
        if prefix_tokens is None:
            return tokens
        if slots is not None and slots.shape[0] > 0:
            prefix_tokens = prefix_tokens + slots
        prefix = prefix_tokens.to(out_dtype).expand(tokens.shape[0], -1, -1)  # [R, P, D]
        return torch.cat([prefix, tokens], dim=1)


def _product_dtype(weight: torch.dtype, out: torch.dtype) -> torch.dtype:
    return out if out in HALVES and weight not in HALVES else weight


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    keep_idx: Tensor | None,
    prefix_tokens: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    R, K = (x.shape[0], num_patches(x, weight)) if keep_idx is None else keep_idx.shape
    P = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    return weight.new_empty((R, P + K, weight.shape[0]), dtype=out_dtype)


def _backward_reference(
    grad: Tensor,  # [R, P + K, D]
    x: Tensor,
    weight: Tensor,
    pos_embed: Tensor | None,
    keep_idx: Tensor | None,
    prefix_tokens: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    scale: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_x, need_weight, need_bias, need_pos, need_prefix = output_mask
    dtype, acc = _product_dtype(weight.dtype, grad.dtype), accumulator(grad.dtype, weight.dtype)
    P = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    rows = grad[:, P:].flatten(0, 1)  # [R K, D]
    dprefix = grad[:, :P].sum(0, dtype=acc)  # [P, D]
    dx, dweight, dbias, dpos = (grad.new_empty(0) for _ in range(4))
    with without_autocast(x.device):
        if need_x:
            dpatches = rows.to(dtype) @ weight.flatten(1).to(dtype)  # [R K, C kh kw]
            dx = image_gradient(dpatches, x, weight, keep_idx, std, scale)
        if need_weight:
            patches = kept_patches(x, weight, keep_idx, mean, std, scale).to(dtype).flatten(0, 1)
            dweight = (rows.to(dtype).mT @ patches).to(weight.dtype).view(weight.shape)
        if need_bias:
            dbias = rows.sum(0, dtype=acc).to(weight.dtype)
        if need_pos and pos_embed is not None:
            N = num_patches(x, weight)
            if keep_idx is None:
                dpos = grad[:, P:].sum(0, dtype=acc)
            else:
                dpos = sum_by_index(rows.to(acc), keep_idx.flatten(), N)
            if pos_embed.shape[0] > N:
                dpos = torch.cat([dprefix, dpos])
            dpos = dpos.to(pos_embed.dtype)
    if prefix_tokens is None or not need_prefix:
        return dx, dweight, dbias, dpos, grad.new_empty(0)
    return dx, dweight, dbias, dpos, dprefix.to(prefix_tokens.dtype)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pos_embed: Tensor | None,
    keep_idx: Tensor | None,
    prefix_tokens: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    scale: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (x, weight, weight[:, 0, 0, 0], pos_embed, prefix_tokens)
    return tuple(
        grad.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)
        for tensor, needed in zip(inputs, output_mask, strict=True)
    )


define(
    "patch_embed(Tensor x, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? keep_idx,"
    " Tensor? prefix_tokens, Tensor? mean, Tensor? std, float scale, ScalarType out_dtype)"
    " -> Tensor",
    reference=_reference,
    fake=_fake,
)
define(
    "patch_embed_backward(Tensor grad, Tensor x, Tensor weight, Tensor? pos_embed,"
    " Tensor? keep_idx, Tensor? prefix_tokens, Tensor? mean, Tensor? std, float scale,"
    " bool[5] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dpos,"
    " Tensor dprefix)",
    reference=_backward_reference,
    fake=_backward_fake,
)
_op = torch.ops.m2ae_kernels.patch_embed.default


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, pos_embed, keep_idx, prefix_tokens, mean, std, ctx.scale, _ = inputs
    ctx.save_for_backward(x, weight, pos_embed, keep_idx, prefix_tokens, mean, std)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, pos_embed, _, prefix_tokens, *_ = ctx.needs_input_grad
    output_mask = [x, weight, bias, pos_embed, prefix_tokens]
    dx, dweight, dbias, dpos, dprefix = torch.ops.m2ae_kernels.patch_embed_backward(
        grad, *ctx.saved_tensors, ctx.scale, output_mask
    )
    grads = (dx, dweight, dbias, dpos, None, dprefix)
    needed = ctx.needs_input_grad[:6]
    wanted = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return *wanted, *(None,) * 4


torch.library.register_autograd(
    "m2ae_kernels::patch_embed", _backward, setup_context=_setup_context
)
refuse_second_derivative("patch_embed")
