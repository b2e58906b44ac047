"""The ops of siglip_loss in plain PyTorch, by a few N x M matrices. Math: siglip_loss.py"""

import torch
import torch.nn.functional as F
from torch import Tensor

from m2ae_kernels.ops._contrastive_pairs import Pairing, entries
from m2ae_kernels.ops._contrastive_rows import inverse_norm, present_rows, unnormalize
from m2ae_kernels.ops._plain import accumulator, without_autocast


def forward(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    target: Tensor | None,  # [N]
    query_mask: Tensor | None,  # [N]
    key_mask: Tensor | None,  # [M]
    query_ids: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    weight: Tensor | None,  # [N]
    target_offset: int,
    ignore_index: int,
    same_id: int,
    normalize: bool,
    eps: float,
    per_row: bool,
    gradients: list[bool],
    allow_tf32: bool,
    workspace: int,
) -> tuple[Tensor, ...]:
    """The loss, differentiable where no gradients are asked for; those; inverse norms."""
    rows = (target, query_mask, key_mask, query_ids, key_ids)
    pairing = Pairing(*rows, target_offset, ignore_index, same_id, exclude_self=False)
    N, device, dtype = len(image_features), image_features.device, accumulator(image_features.dtype)
    with without_autocast(device):
        rnorm_q = inverse_norm(image_features, query_mask, normalize, eps)
        rnorm_k = inverse_norm(text_features, key_mask, normalize, eps)
        x = present_rows(image_features, query_mask, rnorm_q)
        y = present_rows(text_features, key_mask, rnorm_k)
        scale = logit_scale.to(dtype)
        absent, positive, errors = _errors(x, y, scale, logit_bias.to(dtype), pairing)
        losses = -F.logsigmoid(-errors).sum(1)  # softplus, exact for small and for large ones
        row = _row_weights(losses.new_ones(N), weight, query_mask)
        losses = _row_weights(losses, weight, query_mask)
        grads = [losses.new_empty(0) for _ in gradients]
        if any(gradients):
            made = _gradients(row, errors, absent, positive, x, y)
            grads = _of_inputs(*made, x, y, scale, rnorm_q, rnorm_k, eps, pairing, gradients)
    return losses if per_row else losses.sum(), *grads, rnorm_q, rnorm_k


def backward(
    grad: Tensor,  # [N], or [] of the weighted sum
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    weight: Tensor | None,
    rnorm_q: Tensor,
    rnorm_k: Tensor,
    target_offset: int,
    ignore_index: int,
    same_id: int,
    normalize: bool,
    eps: float,
    allow_tf32: bool,
    workspace: int,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients, in the dtypes of the inputs."""
    inputs = (image_features, text_features, logit_scale, logit_bias)
    rows = (target, query_mask, key_mask, query_ids, key_ids)
    pairing = Pairing(*rows, target_offset, ignore_index, same_id, exclude_self=False)
    device, dtype = image_features.device, accumulator(image_features.dtype)
    with without_autocast(device):
        x = present_rows(image_features, query_mask, rnorm_q)
        y = present_rows(text_features, key_mask, rnorm_k)
        scale = logit_scale.to(dtype)
        absent, positive, errors = _errors(x, y, scale, logit_bias.to(dtype), pairing)
        row = _row_weights(grad.expand(len(x)), weight, query_mask)
        made = _gradients(row, errors, absent, positive, x, y)
        grads = _of_inputs(*made, x, y, scale, rnorm_q, rnorm_k, eps, pairing, output_mask)
    return tuple(made.to(tensor.dtype) for made, tensor in zip(grads, inputs, strict=True))


def _errors(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, pairing: Pairing
) -> tuple[Tensor, Tensor, Tensor]:  # [N, M] each
    """Which pairs are absent, which positive, and the logits, with the sign that is wrong.

    The loss of a pair is softplus(error), the derivative that of it, sigma(error): as 1 - sigma of
    the other sign, they would lose all digits of a pair that is nearly right.
    """
    absent, positive, _ = entries(pairing, len(x), len(y), x.device)
    logits = scale * (x @ y.mT) + bias
    return absent, positive, torch.where(positive, -logits, logits).masked_fill(absent, -torch.inf)


def _row_weights(rows: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:  # [N]
    if weight is not None:
        rows = rows * weight.to(rows.dtype)
    return rows if mask is None else torch.where(mask, rows, 0)


def _gradients(
    row: Tensor, errors: Tensor, absent: Tensor, positive: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, M] times y, its transpose times x, and its sum: the derivatives by the logits."""
    share = errors.sigmoid()
    dlogits = row[:, None] * torch.where(positive, -share, share)
    dlogits = dlogits.masked_fill(absent, 0)
    return dlogits @ y, dlogits.mT @ x, dlogits.sum()


def _of_inputs(
    dx: Tensor,
    dy: Tensor,
    dbias: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    rnorm_q: Tensor,
    rnorm_k: Tensor,
    eps: float,
    pairing: Pairing,
    needed: list[bool],
) -> list[Tensor]:
    nothing = [dx.new_empty(0) for _ in needed]
    made = [
        unnormalize(scale * dx, x, rnorm_q, eps, pairing.query_mask),
        unnormalize(scale * dy, y, rnorm_k, eps, pairing.key_mask),
        (x * dx).sum(),
        dbias,
    ]
    return [grad if need else none for grad, none, need in zip(made, nothing, needed, strict=True)]
