r"""siglip_loss: for each image and text, are the two a pair? Nothing N x M is saved.

Math. x_i and y_j are the rows of image_features and text_features (divided by max(|.|, eps) if
normalize), s the scale, b the bias, w_i the weight of image i, l_ij = s x_i . y_j + b. With
softplus(l) = log(1 + exp(l)) and its derivative sigma(l) = 1 / (1 + exp(-l)):

    loss_ij = softplus(-l_ij) if i and j are a pair, softplus(l_ij) if not, 0 if one is absent
    loss_i = w_i times the sum of loss_ij over the texts j
    dl_ij = -w_i sigma(-l_ij) if i and j are a pair, w_i sigma(l_ij) if not, 0 if one is absent
    dx = s dl y    dy = s dl^T x    ds = sum_i x_i . (dl y)_i    db = sum_ij dl_ij

and through the division by |.|: (dx - x (x . dx)) / |.|. No softmax couples the entries, so the
gradients of the sum are made in forward, where the logits are, up to the upstream scalar.

Kernels: csrc/cpu/siglip_loss.cpp on the CPU, tile by tile: nothing N x M is held there. Elsewhere
the reference serves, with a few N x M matrices in each direction.
Used by: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
"""

import torch
from torch import Tensor

from m2ae_kernels.ops import _siglip_loss_reference
from m2ae_kernels.ops._checks import expect_dtype, refuse_forward_mode
from m2ae_kernels.ops._siglip_loss_arguments import siglip_loss_of
from m2ae_kernels.ops._siglip_loss_op import registered

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    target: Tensor | None = None,
    target_offset: int = 0,
    ignore_index: int = -100,
    normalize: bool = False,
    eps: float = 1e-12,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "negative",
    weight: Tensor | None = None,
    reduction: str = "mean",
    allow_tf32: bool | None = None,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """Sigmoid loss: binary cross entropy of "these two are a pair" over all images and texts.

    Args:
        image_features: the queries, [N, D]; float32, bfloat16 or float16.
        text_features: the keys, [M, D], in the dtype of `image_features`. Texts that are nobody's
            pair are further negatives.
        logit_scale: factor on the similarities, already exponentiated: a number, or a tensor of
            one element on the device of the features, which is read there and gets its gradient.
        logit_bias: what is added to each logit: a number or a tensor, as logit_scale.
        target: the text that is each image's pair, [N] int64 in [0, M), or `ignore_index`. Several
            images may share a text. None is arange(N) + target_offset.
        target_offset: without a target, the text that is the first image's pair.
        ignore_index: an image with this target has no pair: all texts are negatives for it.
        normalize: divide each row by its norm first.
        eps: smallest norm to divide by, > 0; as in torch.nn.functional.normalize.
        query_mask: [N] bool; an image with False is absent: no entry with it counts. It may hold
            NaN, and its gradient is 0.
        key_mask: [M] bool; the same for texts.
        query_ids: group of each image, [N] int64; needs key_ids.
        key_ids: group of each text, [M] int64; needs query_ids.
        same_id: what an image and a text of one group are beside the targets: "negative", as any
            other; "ignore", absent; or "positive", a pair, too.
        weight: of each image, [N] float, of either sign; gets no gradient.
        reduction: "mean" is the sum divided by the number of images that are present, or by the
            sum of their weights; "sum"; or "none".
        allow_tf32: on CUDA, whether products of float32 may round their factors to tf32; None
            follows torch.backends.cuda.matmul.
        max_workspace_bytes: what a kernel may use for temporaries that grow with N M, >= 0; the
            least it can do with is one tile. None is 512 MiB.

    Returns:
        The loss, a float32 scalar, 0 if no image is present; with reduction="none" of each image,
        [N] float32, weight included. Differentiable once with respect to image_features,
        text_features, logit_scale and logit_bias. Under "mean" and "sum" the gradients are made in
        the forward, if one is needed; under "none" the backward computes the logits again.

    Without masks and weight it is open_clip's SigLipLoss. A row that holds NaN, and is present,
    spreads it as in PyTorch. A row of norm 0 stays 0 under normalize, and its gradient is divided
    by eps.

    Precision: dot products, sums and the loss are float32 for every dtype, with log1p, so that a
    loss of 1e-20 still has its leading digits; gradients are float32 until the upstream one has
    been multiplied in, and then rounded to the dtype of their input. Under autocast the features
    are rounded to the autocast dtype, scale and bias are not.

    Raises:
        ValueError: a shape does not fit; on the CPU, an element of `target` is out of range (on a
            GPU such an image has no pair); eps, same_id, reduction or max_workspace_bytes is not
            as above; ids are missing; weight requires a gradient.
        TypeError: a dtype or a device is not as above.
    """
    for name, rows in {"image_features": image_features, "text_features": text_features}.items():
        cure = "; m2ae_kernels.reference.siglip_loss takes float64"
        expect_dtype("siglip_loss", name, rows, FLOATING, cure)
    inputs = (image_features, text_features, logit_scale, logit_bias)
    refuse_forward_mode("siglip_loss", *inputs, weight)
    pairing = (target, target_offset, ignore_index, query_mask, key_mask, query_ids, key_ids)
    options = (same_id, normalize, eps, weight, reduction, allow_tf32, max_workspace_bytes)
    arguments = (*inputs, *pairing, *options)
    return siglip_loss_of(registered, True, *arguments)


def reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    target: Tensor | None = None,
    target_offset: int = 0,
    ignore_index: int = -100,
    normalize: bool = False,
    eps: float = 1e-12,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "negative",
    weight: Tensor | None = None,
    reduction: str = "mean",
    allow_tf32: bool | None = None,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """What siglip_loss means, in plain PyTorch, differentiable; float64 computes in float64."""
    inputs = (image_features, text_features, logit_scale, logit_bias)
    pairing = (target, target_offset, ignore_index, query_mask, key_mask, query_ids, key_ids)
    options = (same_id, normalize, eps, weight, reduction, allow_tf32, max_workspace_bytes)
    arguments = (*inputs, *pairing, *options)
    return siglip_loss_of(_siglip_loss_reference.forward, False, *arguments)
