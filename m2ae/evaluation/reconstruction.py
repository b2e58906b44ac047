"""How near reconstructed images come to the originals, and to what a constant would reach."""

import math

from torch import Tensor


def psnr(images: Tensor, targets: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio, 10 * log10(data_range^2 / mean squared error).

    Args:
        images: [B, 3, H, W] floats in [0, data_range].
        targets: as `images`.
        data_range: the difference of the brightest and the darkest value a pixel can have, > 0.

    Returns:
        [B] float32 in dB, the mean squared error of each image in float64. Infinite for equal
        images; NaN where an image has NaN.

    Raises:
        ValueError: the shapes are not [B, 3, H, W] and equal, an image has no pixel, or
            `data_range` is not above 0.
        TypeError: an input is not of floats.
    """
    if images.shape != targets.shape:
        raise ValueError(
            "psnr: expected images and targets of one shape, "
            f"got {list(images.shape)} and {list(targets.shape)}"
        )
    _check_images("psnr", "images", images)
    _check_images("psnr", "targets", targets)
    if not data_range > 0:
        raise ValueError(f"psnr: expected data_range > 0, got {data_range}")
    error = (images.double() - targets.double()).square().mean(dim=(1, 2, 3))  # [B]
    return (20 * math.log10(data_range) - 10 * error.log10()).float()


def mean_image_psnr(train_images: Tensor, targets: Tensor) -> Tensor:
    """The PSNR of a predictor that has seen no input: always the mean of the training images.

    A reconstruction says something about its input only where it is better than this.

    Args:
        train_images: [n, 3, H, W] floats in [0, 1], n >= 1.
        targets: [B, 3, H, W] floats in [0, 1].

    Returns:
        [B] float32 in dB.

    Raises:
        ValueError: the shapes are not as above, or of different H, W.
        TypeError: an input is not of floats.
    """
    _check_images("mean_image_psnr", "train_images", train_images)
    _check_images("mean_image_psnr", "targets", targets)
    if not len(train_images) or train_images.shape[1:] != targets.shape[1:]:
        raise ValueError(
            "mean_image_psnr: expected train_images [n, 3, H, W] with n >= 1 and targets "
            f"[B, 3, H, W], got {list(train_images.shape)} and {list(targets.shape)}"
        )
    mean = train_images.double().mean(dim=0)  # [3, H, W]
    return psnr(mean.expand(targets.shape), targets)


def _check_images(function: str, name: str, images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"{function}: expected {name} [B, 3, H, W], got {list(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"{function}: expected {name} of floats, got {images.dtype}")
