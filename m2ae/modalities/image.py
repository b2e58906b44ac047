"""Images: patches to tokens to a pooled vector, and a latent back to pixels.

Encoder: a ViT without class token (Dosovitskiy et al. 2021); a kernel = stride convolution makes
the patch embeddings, and patches that are masked are never computed (He et al. 2022, MAE).
Decoder: latent to tokens to pixels by a kernel = stride transposed convolution.
"""

import math

import torch
from torch import Tensor, nn

from m2ae.config import ImageConfig
from m2ae.models.blocks import TokenHead, Transformer, learned_vectors, masked_mean
from m2ae.outputs import EncoderOutput
from m2ae_kernels import patch_embed

CHANNELS = 3  # RGB


def to_unit_range(pixel_values: Tensor) -> Tensor:
    """Pixels as floats in [0, 1]: uint8 is divided by 255, floats are returned as they are."""
    return pixel_values / 255 if pixel_values.dtype == torch.uint8 else pixel_values


class ImageEncoder(nn.Module):
    """Pixels to patch tokens.

    Args:
        config: sizes; `mean` and `std` belong to the model, so images come in raw.
    """

    mean: Tensor  # [3]
    std: Tensor  # [3]

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        D, p = config.embed_dim, config.patch_size
        self.proj = nn.Conv2d(CHANNELS, D, kernel_size=p, stride=p)
        # Without blocks, positions would add the same mean position to every image.
        self.positions = learned_vectors(config.num_patches, D) if config.depth else None
        self.transformer = Transformer(D, config.depth, config.heads, config.mlp_ratio)
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)

    def forward(
        self,
        pixel_values: Tensor,
        *,
        keep_idx: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode whole images, or only some of their patches.

        Args:
            pixel_values: [B, 3, H, W], uint8 or floats in [0, 1].
            keep_idx: [B, K] int32 or int64; only these patches are computed.
            visible: [B, N] bool; patches that are False are computed, but no other token sees them
                and the pooled vector leaves them out.

        Returns:
            tokens [B, N, D] or [B, K, D], mask (`visible`), pooled [B, D].
        """
        tokens = patch_embed(
            pixel_values,
            self.proj.weight,
            self.proj.bias,
            self.positions,
            keep_idx,
            mean=self.mean,
            std=self.std,
        )  # [B, N, D] or [B, K, D]
        tokens = self.transformer(tokens, visible)
        return EncoderOutput(tokens, visible, masked_mean(tokens, visible))


class ImageDecoder(nn.Module):
    """A latent to pixels.

    Args:
        config: sizes, the token head and the activation of the output.
        latent_dim: channels L of the latent.
    """

    def __init__(self, config: ImageConfig, latent_dim: int) -> None:
        super().__init__()
        D, p = config.embed_dim, config.patch_size
        self.grid = config.grid
        self.output = config.output
        self.token_head = TokenHead(
            latent_dim, config.num_patches, D, config.token_head, config.token_activation
        )
        self.transformer = Transformer(D, config.decoder_depth, config.heads, config.mlp_ratio)
        bound = 1 / math.sqrt(D)
        self.weight = nn.Parameter(torch.empty(D, CHANNELS, p, p).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(CHANNELS))

    def forward(self, z: Tensor) -> Tensor:
        """Draw images.

        Args:
            z: [B, L].

        Returns:
            [B, 3, H, W]. In eval mode clamped to [0, 1]; in training mode not, because a clamp
            would stop the gradient of every pixel beyond it.
        """
        image = self.to_pixels(self.transformer(self.token_head(z)))
        if self.output == "sigmoid":
            image = image.sigmoid()
        return image if self.training else image.clamp(0, 1)

    def to_pixels(self, tokens: Tensor) -> Tensor:
        """The transposed convolution, as one matrix product: patches do not overlap.

        Args:
            tokens: [B, N, D].

        Returns:
            [B, 3, H, W], F.conv_transpose2d of the tokens on their grid with stride p.
        """
        D, C, p, _ = self.weight.shape
        gh, gw = self.grid
        patches = tokens @ self.weight.view(D, C * p * p)  # [B, N, C * p * p]
        patches = patches.view(-1, gh, gw, C, p, p).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(-1, C, gh * p, gw * p) + self.bias[:, None, None]  # [B, C, H, W]
