"""The JEPA predictor: features of masked patches, told from those of visible ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2ae.masking import DenseMasks, MaskSpec
from m2ae.models.blocks import Transformer, learned_vectors


class PatchPredictor(nn.Module):
    """A narrow ViT over context tokens and mask tokens (Assran et al. 2023, I-JEPA).

    Args:
        embed_dim: channels D of the encoder's tokens.
        num_patches: N.
        width: channels inside.
        depth: blocks.
        heads: attention heads, a divisor of `width`.
    """

    def __init__(
        self, embed_dim: int, num_patches: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(embed_dim, width)
        self.mask_token = learned_vectors(width)
        self.positions = learned_vectors(num_patches, width)
        self.transformer = Transformer(width, depth, heads, mlp_ratio=4.0)
        self.head = nn.Linear(width, embed_dim)

    def forward(self, context: Tensor, masks: MaskSpec) -> Tensor:
        """Predict features.

        Args:
            context: the context encoder's tokens: [B, K, D] at `masks.keep_idx`, or [B, N, D] of
                all patches for dense masks, where only the visible ones are read.
            masks: what is visible and what to predict.

        Returns:
            [B, M, D] at `masks.predict_idx`, or [B, N, D] for dense masks, of which the positions
            that are not visible are predictions.
        """
        x = self.embed(context)
        if isinstance(masks, DenseMasks):
            x = torch.where(masks.visible[..., None], x, self.mask_token)  # [B, N, width]
            return self.head(self.transformer(x + self.positions))
        x = x + F.embedding(masks.keep_idx, self.positions)  # [B, K, width]
        queries = self.mask_token + F.embedding(masks.predict_idx, self.positions)
        x = self.transformer(torch.cat([x, queries], dim=1))  # [B, K + M, width]
        return self.head(x[:, context.shape[1] :])
