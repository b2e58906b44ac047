"""Contrastive losses that are a choice of arguments of info_nce_loss, and have no kernel."""

from typing import Any

import torch
from torch import Tensor

from m2ae_kernels.ops._checks import expect_dtype
from m2ae_kernels.ops.info_nce_loss import info_nce_loss


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """CLIP's loss: each image finds its text among all texts, and each text its image.

    Args:
        image_features: [N, D]; float32, bfloat16 or float16. Not normalized here, unless
            normalize=True is among the keywords.
        text_features: [N, D], the pair of image i in row i; same dtype.
        logit_scale: factor on the similarities, already exponentiated: a number, or a tensor of
            one element, which gets its gradient.
        logit_bias: a number, or a tensor of one element. It cancels: its gradient is 0.
        kwargs: any keyword argument of info_nce_loss.

    Returns:
        What info_nce_loss returns with symmetric=True: the mean of both directions' mean cross
        entropies, a float32 scalar, unless `reduction` or `return_metrics` asks for more.

    Raises:
        ValueError, TypeError: as info_nce_loss.

    Source: Radford et al. 2021, "Learning transferable visual models from natural language
    supervision", figure 3.
    """
    given = {"symmetric": True, "logit_bias": logit_bias, **kwargs}
    return info_nce_loss(image_features, text_features, logit_scale, **given)


def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    normalize: bool = True,
    eps: float = 1e-12,
    weight: Tensor | None = None,
    reduction: str = "mean",
    allow_tf32: bool | None = None,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """SimCLR's loss: each of 2N views finds the other view of its item among 2N - 1.

    Args:
        z1: first view of each item, [N, D]; float32, bfloat16 or float16.
        z2: second view of each item, [N, D], in the dtype of `z1`.
        temperature: the similarities are divided by it: a number > 0, or a tensor of one element
            on the device of `z1`, which gets its gradient.
        normalize: divide each row by its norm first, so that similarities are cosines.
        eps: smallest norm to divide by, > 0.
        weight: factor on both losses of each item, [N], any floating dtype; gets its gradient.
        reduction: "mean", by weight; "sum"; or "none".
        allow_tf32: as in info_nce_loss.
        max_workspace_bytes: as in info_nce_loss.

    Returns:
        The loss, a float32 scalar; with reduction="none" that of each view, [2N]: those of z1,
        then those of z2. One item has no negatives: its loss is 0.

    Raises:
        ValueError: z1 and z2 do not have one shape [N, D], the temperature is a number <= 0, or as
            info_nce_loss.
        TypeError: as info_nce_loss.

    Source: Chen et al. 2020, "A simple framework for contrastive learning of visual
    representations", equation 1.
    """
    if z1.dim() != 2:
        raise ValueError(f"nt_xent_loss: expected z1 [N, D], got {list(z1.shape)}")
    N = z1.shape[0]
    if z2.shape != z1.shape:
        raise ValueError(
            f"nt_xent_loss: expected z2 [N = {N}, D = {z1.shape[1]}], got {list(z2.shape)}"
        )
    expect_dtype("nt_xent_loss", "z2", z2, (z1.dtype,))
    if weight is not None and weight.shape != (N,):
        raise ValueError(f"nt_xent_loss: expected weight [N = {N}], got {list(weight.shape)}")
    z = torch.cat([z1, z2])
    loss = info_nce_loss(
        z,
        z,
        _inverse("nt_xent_loss", temperature),
        target=torch.arange(2 * N, device=z.device).roll(N),
        symmetric=False,
        exclude_self=True,
        normalize=normalize,
        eps=eps,
        weight=None if weight is None else torch.cat([weight, weight]),
        reduction=reduction,
        allow_tf32=allow_tf32,
        max_workspace_bytes=max_workspace_bytes,
    )
    return _of_queries(loss, reduction)


def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    normalize: bool = True,
    eps: float = 1e-12,
    weight: Tensor | None = None,
    reduction: str = "mean",
    allow_tf32: bool | None = None,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """Supervised contrastive loss: each row finds the other rows of its label among all others.

    The loss of row i is the mean, over the other rows j of its label, of -log(exp(l_ij) / sum over
    all rows but i of exp(l)): the form "out" of the paper, without its factor T / T_base.

    Args:
        features: [N, D]; float32, bfloat16 or float16. Several views of an item are several rows
            of one label.
        labels: class of each row, [N] int64.
        temperature: the similarities are divided by it: a number > 0, or a tensor of one element
            on the device of `features`, which gets its gradient.
        normalize: divide each row by its norm first, so that similarities are cosines.
        eps: smallest norm to divide by, > 0.
        weight: factor on the loss of each row, [N], any floating dtype; gets its gradient.
        reduction: "mean" over the rows whose label occurs more than once, by weight; "sum"; or
            "none".
        allow_tf32: as in info_nce_loss.
        max_workspace_bytes: as in info_nce_loss.

    Returns:
        The loss, a float32 scalar; with reduction="none" that of each row, [N]. A row whose label
        occurs once has no positive: its loss is 0 and does not count in the mean, but it is a
        negative for the others.

    Raises:
        ValueError: a shape does not fit, the temperature is a number <= 0, or as info_nce_loss.
        TypeError: as info_nce_loss.

    Source: Khosla et al. 2020, "Supervised contrastive learning", equation 2.
    """
    if features.dim() != 2:
        raise ValueError(f"sup_con_loss: expected features [N, D], got {list(features.shape)}")
    N = features.shape[0]
    if labels.shape != (N,):
        raise ValueError(f"sup_con_loss: expected labels [N = {N}], got {list(labels.shape)}")
    expect_dtype("sup_con_loss", "labels", labels, (torch.int64,))
    loss = info_nce_loss(
        features,
        features,
        _inverse("sup_con_loss", temperature),
        query_ids=labels,
        key_ids=labels,
        same_id="positive",
        symmetric=False,
        exclude_self=True,
        normalize=normalize,
        eps=eps,
        weight=weight,
        reduction=reduction,
        allow_tf32=allow_tf32,
        max_workspace_bytes=max_workspace_bytes,
    )
    return _of_queries(loss, reduction)


def _inverse(function: str, temperature: float | Tensor) -> float | Tensor:
    # The value of a tensor stays on its device: reading it would wait for a GPU.
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"{function}: expected temperature > 0, got {temperature}")
    return 1 / temperature


def _of_queries(loss: Any, reduction: str) -> Tensor:
    rows: Tensor = loss[0] if reduction == "none" else loss
    return rows
