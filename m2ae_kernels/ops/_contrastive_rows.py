"""Rows of a contrastive loss as they enter its products: absent ones 0, normalized; and back."""

import torch
from torch import Tensor

from m2ae_kernels.ops._plain import accumulator


def inverse_norm(features: Tensor, mask: Tensor | None, normalize: bool, eps: float) -> Tensor:
    """What normalization multiplies the rows with, [N]; or empty."""
    dtype = accumulator(features.dtype)
    if not normalize:
        return features.new_empty(0, dtype=dtype)
    features = _present(features, mask)
    # The squares of float32 rows of norm 1e20 are no float32.
    norm = torch.linalg.vector_norm(features, dim=1, dtype=torch.float64)
    return norm.clamp(min=eps).reciprocal().to(dtype)


def present_rows(features: Tensor, mask: Tensor | None, rnorm: Tensor) -> Tensor:  # [N, D]
    """The rows in the accumulator's dtype, multiplied with `rnorm` unless that is empty."""
    rows = _present(features, mask).to(accumulator(features.dtype))
    return rows * rnorm[:, None] if rnorm.numel() > 0 else rows


def _present(rows: Tensor, mask: Tensor | None) -> Tensor:  # [N, D]
    """Absent rows become 0, whatever they hold."""
    return rows if mask is None else torch.where(mask[:, None], rows, 0)


def unnormalize(
    grad: Tensor, rows: Tensor, rnorm: Tensor, eps: float, mask: Tensor | None
) -> Tensor:  # [N, D]
    """The gradient before the division by the norm, and 0 for absent rows."""
    if rnorm.numel() > 0:
        divided_by_norm = rnorm < torch.full_like(rnorm, 1 / eps)  # else by eps, a constant
        along = torch.where(divided_by_norm, (grad * rows).sum(1), 0)
        grad = (grad - rows * along[:, None]) * rnorm[:, None]
    return _present(grad, mask)
