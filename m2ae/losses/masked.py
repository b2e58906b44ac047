"""Errors over the part of a tensor that counts.

What does not count is replaced before any arithmetic: it may hold NaN, and its gradient is exactly
0. A product with a mask of zeros would keep the NaN, in the value and in every gradient.
"""

import math

import torch
from torch import Tensor


def masked_difference(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Prediction - target where it counts, 0 elsewhere.

    Args:
        prediction: [*, ...].
        target: [*, ...], taken as a constant.
        mask: [*] bool, the leading dimensions.

    Returns:
        [*, ...], float32 or wider.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    mask = mask.reshape(*mask.shape, *(1,) * (prediction.ndim - mask.ndim))
    return torch.where(mask, prediction.to(wide) - target.detach().to(wide), 0)


def mean_over_mask(errors: Tensor, mask: Tensor) -> Tensor:
    """Mean of what counts.

    Args:
        errors: [*, ...], 0 where the mask is False.
        mask: [*] bool, the leading dimensions.

    Returns:
        0-d; 0 if nothing counts.
    """
    values = math.prod(errors.shape[mask.ndim :])
    return errors.sum() / (mask.sum() * values).clamp(min=1)
