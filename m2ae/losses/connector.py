r"""The objective of a connector in one direction: predict the target, and tell it from others.

    L      = alpha L_pred + (1 - alpha) L_cl
    L_pred = mean of smooth-L1(z^ - sg(z)), or the mean over items of |z^ - sg(z)|^2       (5)
    L_cl   = 1 / 2N  sum over n of -log softmax_m(cos(q_n, k_m) / tau)[n]
                                   -log softmax_m(cos(k_n, q_m) / tau)[n]                  (6)

sg is a stop-gradient: with an encoder that is trained, both sides could meet at a constant. Two
rows with one latent are one thing, and no negatives of each other.

Source: Lei et al. 2025, "M3-JEPA" (arXiv 2409.05929), equations 3 to 6; smooth-L1 and tau = 0.03
are those of its code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from m2ae.config import ConnectorLossConfig, PredictionLoss
from m2ae_kernels import info_nce_loss


def connector_loss(
    prediction: Tensor,
    target: Tensor,
    query: Tensor,
    key: Tensor,
    config: ConnectorLossConfig,
    ids: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective and its terms.

    Args:
        prediction: [B, D] of the targets' latents.
        target: [B, D] latents, taken as constants.
        query: [B, d]; normalized here.
        key: [B, d] of the same items; normalized here.
        config: shares, and what the terms are.
        ids: [B] int64, equal for rows that are one thing; None = no two are.

    Returns:
        0-d float32, and the raw terms "pred" and "cl" by name; one whose share is 0 is neither
        computed nor listed, and what it alone depends on has no gradient.
    """
    terms: dict[str, tuple[float, Tensor]] = {}  # share and raw value
    if config.alpha > 0:
        terms["pred"] = config.alpha, prediction_loss(prediction, target, config.pred_loss)
    if config.alpha < 1:
        contrast = info_nce_loss(
            query,
            key,
            1 / config.temperature,
            normalize=True,
            query_ids=ids,
            key_ids=ids,
            same_id="negative" if ids is None else config.same_item,
        )
        terms["cl"] = 1 - config.alpha, contrast
    loss = sum((share * value for share, value in terms.values()), start=query.new_zeros(()))
    return loss, {name: value for name, (_, value) in terms.items()}


def prediction_loss(
    prediction: Tensor, target: Tensor, kind: PredictionLoss = "smooth_l1"
) -> Tensor:
    """How far predicted latents are from the targets.

    Args:
        prediction: [B, D].
        target: [B, D], taken as a constant.
        kind: "smooth_l1" with its bend at 1, the mean over items and channels; "squared_norm", the
            mean over items of the sum over channels.

    Returns:
        0-d, float32 or wider.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    prediction, target = prediction.to(wide), target.detach().to(wide)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(prediction, target)
    return (prediction - target).square().sum(dim=1).mean()


def mutual_information_bound(contrast: float, items: int) -> float:
    """What a contrastive loss says at least about the information that query and key share.

    Args:
        contrast: L_cl over a batch, in nats, every item its own only positive.
        items: in the batch, N.

    Returns:
        log N - L_cl, nats; a batch of N can show no more than log N. An estimate over few batches
        may be above the truth, and a negative one says nothing (van den Oord et al. 2018, CPC,
        section 2.3).
    """
    return math.log(items) - contrast
