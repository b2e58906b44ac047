"""The alignment loss: an image is nearer to its own text than to the other texts of a batch."""

import math

import torch
from torch import Tensor, nn

from m2ae.config import AlignConfig
from m2ae_kernels import info_nce_loss


class AlignmentLoss(nn.Module):
    """Symmetric InfoNCE on cosine similarities (Radford et al. 2021, CLIP).

    Args:
        config: the temperature, whether it learns, and the limit of its inverse.
    """

    log_scale: Tensor  # 0-d, ln(1 / temperature); a parameter if it learns, else a buffer

    def __init__(self, config: AlignConfig) -> None:
        super().__init__()
        log_scale = torch.tensor(-math.log(config.temperature))
        if config.learn_temperature:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.max_log_scale = math.log(config.max_scale)

    def scale(self) -> Tensor:
        """1 / temperature, 0-d. In training mode the parameter is first held at its limit.

        The limit is on the parameter, as in CLIP's training loop: a clamp of its value here would
        have no gradient beyond the limit, and an optimizer step too far could never be taken back.
        """
        if self.training and self.log_scale.requires_grad:
            with torch.no_grad():
                self.log_scale.clamp_(max=self.max_log_scale)
        return self.log_scale.exp()

    def forward(self, image: Tensor, text: Tensor, is_pair: Tensor) -> Tensor:
        """Compare each image with each text.

        Args:
            image: [B, A] image-only latents; normalized here.
            text: [B, A] text-only latents; normalized here.
            is_pair: [B] bool, True = the item has both. Other items are neither pairs nor
                negatives, and have gradient 0.

        Returns:
            0-d float32, the mean over pairs and both directions; 0 for one pair or none.
        """
        return info_nce_loss(
            image, text, self.scale(), normalize=True, query_mask=is_pair, key_mask=is_pair
        )
