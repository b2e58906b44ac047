"""siglip_loss over the rows of all ranks: the texts visit the images, or are gathered.

No softmax couples the entries, so the gradients of a rank's part are made in forward, where its
logits are, and those of the texts are summed where the texts are at home.

Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.3.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from m2ae_kernels.distributed._keys import NO_TARGET, Keys, check_gather, common_keys
from m2ae_kernels.distributed._once import differentiable_once
from m2ae_kernels.distributed._ranks import Ranks, added
from m2ae_kernels.ops import siglip_loss as on_one_rank
from m2ae_kernels.ops._checks import expect_dtype
from m2ae_kernels.ops._contrastive_arguments import (
    WORKSPACE,
    check_options,
    features,
    number,
    use_tf32,
)
from m2ae_kernels.ops._contrastive_pairs import SAME_ID, check_pairing
from m2ae_kernels.ops.siglip_loss import FLOATING


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    gather: str = "ring",
    group: dist.ProcessGroup | None = None,
    even_batches: bool = False,
    normalize: bool = False,
    eps: float = 1e-12,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "negative",
    allow_tf32: bool | None = None,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """This rank's share of m2ae_kernels.siglip_loss of the images and texts of all ranks.

    Every rank calls it, with its own rows, and later calls backward. The mean of what they return
    is the loss of one process that has all rows: all pairs, divided by the number of images. For
    batches of one size, a share is the sum over this rank's images and all texts, divided by the
    number of this rank's images, which is what open_clip's SigLipLoss returns. Averaging the
    gradients of the parameters over the ranks, as DistributedDataParallel does, gives those of that
    one process, those of logit_scale and logit_bias included. Do not scale by the number of ranks.
    Batches may differ in size: a rank with more images has the larger share.

    Args:
        image_features: this rank's images, [n, D]; float32, bfloat16 or float16.
        text_features: this rank's texts, [m, D], m >= n: row i is the pair of image i, rows from n
            on are further negatives. In the dtype of `image_features`.
        logit_scale: factor on the similarities, already exponentiated, the same on every rank: a
            number, or a tensor of one element, which gets its gradient.
        logit_bias: what is added to each logit: a number or a tensor, as logit_scale.
        gather: "ring" has one rank's texts at a time, which arrive while the ones before are
            compared; "all_gather" has all texts at once, m times the number of ranks.
        group: the process group, None being all ranks. Where torch.distributed is not initialized,
            there is one rank.
        even_batches: whether the caller knows that all ranks have the same m. Otherwise they tell
            each other before; the host waits for that, and with a group that communicates by the
            GPU alone it waits for the GPU, too.
        normalize: divide each row by its norm first.
        eps: smallest norm to divide by, > 0.
        query_mask: [n] bool, False is absent. On every rank or on none, as the following.
        key_mask: [m] bool, the same for texts.
        query_ids: group of each image, [n] int64; ids are compared across ranks.
        key_ids: group of each text, [m] int64.
        same_id: what pairs of one id are beside the targets: "negative", "ignore", "positive".
        allow_tf32: as in m2ae_kernels.siglip_loss.
        max_workspace_bytes: as in m2ae_kernels.siglip_loss, on each rank.

    Returns:
        A float32 scalar. Differentiable once with respect to image_features, text_features,
        logit_scale and logit_bias. The gradients are made in the forward, if one is needed, and
        summed over the ranks before the upstream one is known: it has to be the same on every rank.
        Where it is not, the gradient of the texts is NaN.

    Precision is that of m2ae_kernels.siglip_loss; gradients travel in float32.

    Raises:
        ValueError: as m2ae_kernels.siglip_loss; gather is not as above; this rank is not in
            `group`; the ranks do not agree on D, dtype, or which masks and ids there are (unless
            even_batches, under which that is not looked at).
        TypeError: a dtype or a device is not as above.
    """
    op = "siglip_loss"
    check_gather(op, gather)
    ranks = Ranks.of(op, group)
    if ranks.size == 1:
        return on_one_rank(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            normalize=normalize,
            eps=eps,
            query_mask=query_mask,
            key_mask=key_mask,
            query_ids=query_ids,
            key_ids=key_ids,
            same_id=same_id,
            allow_tf32=allow_tf32,
            max_workspace_bytes=max_workspace_bytes,
        )
    names = ("image_features", "text_features")
    for name, side in zip(names, (image_features, text_features), strict=True):
        expect_dtype(op, name, side, FLOATING)
    images, texts = features(op, image_features, text_features, names)
    n, device = images.shape[0], images.device
    check_options(op, eps, "mean", max_workspace_bytes)
    rows = (query_mask, key_mask, query_ids, key_ids)
    check_pairing(op, n, texts.shape[0], device, None, *rows, 0, NO_TARGET, same_id)
    scale = number(op, "logit_scale", logit_scale, torch.float32, device).float()
    bias = number(op, "logit_bias", logit_bias, torch.float32, device).float()
    keys = common_keys(op, ranks, query_mask, Keys(texts, key_mask, key_ids), even_batches, 0)
    inputs = (images, keys.features, scale, bias)
    options = Options(
        SAME_ID[same_id],
        normalize,
        eps,
        [torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs],
        use_tf32(images, allow_tf32),
        WORKSPACE if max_workspace_bytes is None else max_workspace_bytes,
    )
    present = torch.full((), n, device=device) if query_mask is None else query_mask.sum()
    factor = ranks.size / ranks.sum(present).clamp(min=1)
    rest = (query_mask, keys.mask, query_ids, keys.ids)
    function: Any = _Siglip
    share: Tensor = function.apply(*inputs, *rest, factor, gather == "ring", ranks, options)
    return share


class Options(NamedTuple):
    """What is the same for all parts of the matrix."""

    same_id: int
    normalize: bool
    eps: float
    gradients: list[bool]
    allow_tf32: bool
    workspace: int


Texts = Sequence[Tensor | None]  # features, mask, ids
Compare = Callable[[Texts, Tensor | None, int], tuple[Tensor, ...]]  # texts, target, offset


class _Siglip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        query_mask: Tensor | None,
        key_mask: Tensor | None,
        query_ids: Tensor | None,
        key_ids: Tensor | None,
        factor: Tensor,
        ring: bool,
        ranks: Ranks,
        options: Options,
    ) -> Tensor:
        def compare(keys: Texts, target: Tensor | None, offset: int) -> tuple[Tensor, ...]:
            texts, mask, ids = keys
            outputs: tuple[Tensor, ...] = torch.ops.m2ae_kernels.siglip_loss(
                *(images, texts, scale, bias, target, query_mask, mask, query_ids, ids, None),
                *(offset, NO_TARGET, options.same_id, options.normalize, options.eps, False),
                *(options.gradients, options.allow_tf32, options.workspace),
            )
            return outputs[:5]

        keys = (texts, key_mask, key_ids)
        way = _visited if ring else _gathered
        loss, *made = way(compare, keys, len(images), ranks)
        ctx.ranks = ranks
        ctx.save_for_backward(images, texts, scale, bias, factor, *made)
        return factor * loss

    @staticmethod
    @differentiable_once("siglip_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, factor, made = ctx.saved_tensors[:4], ctx.saved_tensors[4], ctx.saved_tensors[5:]
        upstream = [grad * factor] * 4
        if ctx.needs_input_grad[1]:
            upstream[1] = ctx.ranks.same_or_nan(grad) * factor
        grads = (
            (of * by).to(given.dtype) if need else None
            for given, of, by, need in zip(
                inputs, made, upstream, ctx.needs_input_grad[:4], strict=True
            )
        )
        return *grads, *(None,) * 8


def _gathered(compare: Compare, keys: Texts, n: int, ranks: Ranks) -> list[Tensor]:
    """Loss of the images with all texts, and its gradients."""
    assert keys[0] is not None
    gathered = [of if of is None else ranks.all_gather(of) for of in keys]
    loss, of_images, of_texts, *rest = compare(gathered, None, ranks.rank * len(keys[0]))
    return [loss, of_images, ranks.reduce_scatter(of_texts), *rest]


def _visited(compare: Compare, keys: Texts, n: int, ranks: Ranks) -> list[Tensor]:
    """The same, of one rank's texts after the other's."""
    assert keys[0] is not None
    no_target = torch.full((n,), NO_TARGET, device=keys[0].device)
    sums: list[Tensor] = []

    def visit(visitor: Texts, at_home: bool) -> list[Tensor]:
        loss, of_images, of_texts, *rest = compare(visitor, None if at_home else no_target, 0)
        part = [loss, of_images, *rest]
        sums[:] = added(sums, part) if sums else part
        return [of_texts]

    (of_texts,) = ranks.tour(keys, visit, added)
    loss, of_images, *rest = sums
    return [loss, of_images, of_texts, *rest]
