"""The patches of images as rows, normalized; and the gradient of the rows back in the images."""

import torch
from torch import Tensor

from m2ae_kernels.ops._plain import accumulator, sum_by_index


def num_patches(x: Tensor, weight: Tensor) -> int:  # N
    return (x.shape[2] // weight.shape[2]) * (x.shape[3] // weight.shape[3])


def kept_patches(
    x: Tensor,
    weight: Tensor,
    keep_idx: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    scale: float,
) -> Tensor:  # [R, K, C kh kw]
    """The kept patches, normalized, as rows."""
    (H, W), (kh, kw) = x.shape[2:], weight.shape[2:]
    grid = x.unflatten(3, (W // kw, kw)).unflatten(2, (H // kh, kh))  # [B, C, gh, kh, gw, kw]
    grid = grid.permute(0, 2, 4, 1, 3, 5)  # [B, gh, gw, C, kh, kw]
    if keep_idx is None:
        patches = grid.flatten(1, 2)
    else:
        _check_range(keep_idx, num_patches(x, weight))
        image = _image_of_row(keep_idx, x.shape[0])
        patches = grid[image, keep_idx // (W // kw), keep_idx % (W // kw)]  # [R, K, C, kh, kw]
    patches = patches.to(accumulator(x.dtype, weight.dtype))
    if mean is None and std is None:
        return (patches if scale == 1.0 else patches * scale).flatten(2)
    # (x scale - mean) / std in one product and one sum per pixel
    rstd = patches.new_ones(x.shape[1], 1, 1)
    if std is not None:
        rstd = rstd / std.detach().to(rstd.dtype)[:, None, None]
    patches = patches * (rstd * scale)
    if mean is not None:
        patches = patches - mean.detach().to(rstd.dtype)[:, None, None] * rstd
    return patches.flatten(2)


def _image_of_row(keep_idx: Tensor, B: int) -> Tensor:  # [R, 1]
    return (torch.arange(keep_idx.shape[0], device=keep_idx.device) % max(B, 1))[:, None]


def _check_range(keep_idx: Tensor, N: int) -> None:
    if keep_idx.device.type != "cpu" or keep_idx.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(end) for end in keep_idx.aminmax())
    if low < 0 or high >= N:
        raise ValueError(
            f"patch_embed: expected keep_idx in [0, N = {N}), got {low if low < 0 else high}"
        )


def image_gradient(
    dpatches: Tensor,  # [R K, C kh kw]
    x: Tensor,
    weight: Tensor,
    keep_idx: Tensor | None,
    std: Tensor | None,
    scale: float,
) -> Tensor:  # [B, C, H, W]
    (B, C, H, W), (kh, kw) = x.shape, weight.shape[2:]
    gh, gw = H // kh, W // kw
    dpatches = dpatches.to(accumulator(x.dtype, weight.dtype)) * scale
    if keep_idx is not None:
        patch = _image_of_row(keep_idx, B) * (gh * gw) + keep_idx  # [R, K], in [0, B N)
        dpatches = sum_by_index(dpatches, patch.flatten(), B * gh * gw)
    grid = dpatches.view(B, gh, gw, C, kh, kw)
    if std is not None:
        grid = grid / std.to(grid.dtype)[:, None, None]
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(x.shape).to(x.dtype)
