"""The JEPA loss: predicted against target features, at masked patches only."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from m2ae.losses.masked import masked_difference, mean_over_mask


def jepa_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, kind: Literal["mse", "smooth_l1"] = "mse"
) -> Tensor:
    """Mean error of predicted features (Assran et al. 2023, I-JEPA; its code has smooth-L1).

    Args:
        prediction: [B, M, D].
        target: [B, M, D], taken as a constant.
        mask: [B, M] bool, True = a masked patch of an image that is there. Elsewhere neither side
            is used.
        kind: "mse", or "smooth_l1" with its bend at 1.

    Returns:
        0-d, the mean over masked patches and channels; 0 if there is none.
    """
    difference = masked_difference(prediction, target, mask)
    if kind == "mse":
        return mean_over_mask(difference.square(), mask)
    zero = torch.zeros_like(difference)
    return mean_over_mask(F.smooth_l1_loss(difference, zero, reduction="none"), mask)
