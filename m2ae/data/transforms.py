"""Operations on uint8 images, and the generators that make augmentation repeatable.

Images are uint8 [3, H, W] in and out. Arithmetic is in float32; results are rounded and clamped to
0..255. Every random operation takes its generator, so equal generators give equal images.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# Rec. 601 weights of red, green and blue in the brightness of a pixel.
_LUMA = (0.299, 0.587, 0.114)


def generator_for(seed: int, epoch: int, sample_id: str) -> Generator:
    """The generator of one sample in one epoch, the same on every machine and in every process.

    Args:
        seed: of the run.
        epoch: from 0.
        sample_id: the id in the manifest.

    Returns:
        A new CPU generator, seeded from a SHA-256 hash of the three.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{sample_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def resize(image: Tensor, size: int) -> Tensor:
    """Scale an image to a square, bicubic with antialiasing.

    Args:
        image: uint8 [3, H, W]; one that is not square is stretched, see `center_square`.
        size: side of the result in pixels, at least 1.

    Returns:
        uint8 [3, size, size].

    Raises:
        TypeError: the image is not uint8.
        ValueError: the image is not [3, H, W], or `size` is below 1.
    """
    _check_image("resize", image)
    _check_size("resize", size)
    if image.shape[1:] == (size, size):
        return image
    scaled = F.interpolate(image[None].float(), (size, size), mode="bicubic", antialias=True)
    return _to_uint8(scaled[0])


def center_square(image: Tensor) -> Tensor:
    """Cut the middle square out of an image.

    Args:
        image: uint8 [3, H, W].

    Returns:
        uint8 [3, S, S] with S = min(H, W).

    Raises:
        TypeError: the image is not uint8.
        ValueError: the image is not [3, H, W].
    """
    _check_image("center_square", image)
    H, W = image.shape[1:]
    S = min(H, W)
    top, left = (H - S) // 2, (W - S) // 2
    return image[:, top : top + S, left : left + S]


def random_resized_crop(
    image: Tensor,
    size: int,
    generator: Generator,
    scale: tuple[float, float] = (0.6, 1.0),
    ratio: tuple[float, float] = (0.75, 4 / 3),
) -> Tensor:
    """Cut out a random rectangle and scale it to a square.

    Args:
        image: uint8 [3, H, W].
        size: side of the result in pixels, at least 1.
        generator: drawn from four times.
        scale: least and greatest share of the area, 0 < least <= greatest <= 1.
        ratio: least and greatest width / height, drawn evenly in the logarithm. A rectangle that
            would not fit is cut at the border of the image.

    Returns:
        uint8 [3, size, size].

    Raises:
        TypeError: the image is not uint8.
        ValueError: the image is not [3, H, W], or `size`, `scale` or `ratio` is out of range.
    """
    _check_image("random_resized_crop", image)
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(
            f"random_resized_crop: expected 0 < scale[0] <= scale[1] <= 1, got {scale}"
        )
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"random_resized_crop: expected 0 < ratio[0] <= ratio[1], got {ratio}")
    H, W = image.shape[1:]
    area = H * W * _uniform(generator, *scale)
    aspect = math.exp(_uniform(generator, math.log(ratio[0]), math.log(ratio[1])))
    height = min(H, max(1, round(math.sqrt(area / aspect))))
    width = min(W, max(1, round(math.sqrt(area * aspect))))
    top = round(_uniform(generator, 0, H - height))
    left = round(_uniform(generator, 0, W - width))
    return resize(image[:, top : top + height, left : left + width], size)


def random_horizontal_flip(image: Tensor, generator: Generator, probability: float = 0.5) -> Tensor:
    """Mirror an image, or not. Not for images whose captions tell left from right.

    Args:
        image: uint8 [3, H, W].
        generator: drawn from once.
        probability: of mirroring, 0..1.

    Returns:
        uint8 [3, H, W].

    Raises:
        TypeError: the image is not uint8.
        ValueError: the image is not [3, H, W], or `probability` is out of range.
    """
    _check_image("random_horizontal_flip", image)
    if not 0 <= probability <= 1:
        raise ValueError(
            f"random_horizontal_flip: expected 0 <= probability <= 1, got {probability}"
        )
    return image.flip(2) if _uniform(generator, 0, 1) < probability else image


def color_jitter(image: Tensor, generator: Generator, strength: float = 0.1) -> Tensor:
    """Change brightness, contrast and saturation a little, in this order.

    Args:
        image: uint8 [3, H, W].
        generator: drawn from three times.
        strength: each of the three factors lies within 1 - strength .. 1 + strength; 0..1.

    Returns:
        uint8 [3, H, W].

    Raises:
        TypeError: the image is not uint8.
        ValueError: the image is not [3, H, W], or `strength` is out of range.
    """
    _check_image("color_jitter", image)
    if not 0 <= strength <= 1:
        raise ValueError(f"color_jitter: expected 0 <= strength <= 1, got {strength}")
    brightness, contrast, saturation = (
        _uniform(generator, 1 - strength, 1 + strength) for _ in range(3)
    )
    luma = torch.tensor(_LUMA)[:, None, None]
    pixels = image.float() * brightness
    mean = (pixels * luma).sum(0).mean()
    pixels = mean + (pixels - mean) * contrast
    gray = (pixels * luma).sum(0, keepdim=True)  # [1, H, W]
    return _to_uint8(gray + (pixels - gray) * saturation)


def crop_and_jitter(image: Tensor, size: int, generator: Generator) -> Tensor:
    """A light augmentation that keeps what captions say: a random crop and a little color.

    There is no mirroring in it, since captions may tell left from right.

    Args:
        image: uint8 [3, H, W].
        size: side of the result in pixels, at least 1.
        generator: drawn from seven times.

    Returns:
        uint8 [3, size, size].

    Raises:
        TypeError: the image is not uint8.
        ValueError: the image is not [3, H, W], or `size` is below 1.
    """
    return color_jitter(random_resized_crop(image, size, generator), generator)


def _uniform(generator: Generator, low: float, high: float) -> float:
    # float64: the default dtype of the process must not change what is drawn
    draw = torch.rand((), generator=generator, dtype=torch.float64).item()
    return low + (high - low) * draw


def _to_uint8(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _check_image(name: str, image: Tensor) -> None:
    if image.dtype != torch.uint8:
        raise TypeError(f"{name}: expected an image of dtype torch.uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"{name}: expected an image [3, H, W], got {list(image.shape)}")


def _check_size(name: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{name}: expected size >= 1, got {size}")
