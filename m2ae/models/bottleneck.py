"""The bottleneck: three named stages on the latent, each of which may be left out."""

import torch
from torch import Tensor, nn

from m2ae.config import BottleneckConfig
from m2ae.models.blocks import MLP


class Bottleneck(nn.Module):
    """Semantic compression, cross-modal alignment, information preservation, in this order.

    Args:
        config: which stages there are; one that is left out passes the latent through.
        latent_dim: channels L.
    """

    def __init__(self, config: BottleneckConfig, latent_dim: int) -> None:
        super().__init__()
        L = latent_dim
        self.semantic_compression = (
            SemanticCompression(L) if config.semantic_compression else nn.Identity()
        )
        self.cross_modal_alignment = (
            nn.LayerNorm(L) if config.cross_modal_alignment else nn.Identity()
        )
        self.information_preservation = (
            InformationPreservation(L) if config.information_preservation else PassFirst()
        )

    def forward(self, z: Tensor) -> Tensor:
        """Refine fused features.

        Args:
            z: [B, L], joint or of one modality.

        Returns:
            [B, L].
        """
        compressed = self.semantic_compression(z)
        aligned = self.cross_modal_alignment(compressed)
        return self.information_preservation(aligned, z)


class SemanticCompression(nn.Sequential):
    """An MLP through half the width: what many items share is cheap to keep, details are not.

    Args:
        latent_dim: channels L.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__(nn.LayerNorm(latent_dim), MLP(latent_dim, latent_dim // 2))


class InformationPreservation(nn.Module):
    """A skip around the earlier stages, with one gate a channel that starts closed.

    Args:
        latent_dim: channels L.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, refined: Tensor, z: Tensor) -> Tensor:
        """Add what the reconstruction needs of `z`, both [B, L], to `refined`."""
        return refined + self.gate * z


class PassFirst(nn.Module):
    """The first of two arguments: InformationPreservation left out."""

    def forward(self, refined: Tensor, z: Tensor) -> Tensor:
        """Return `refined`."""
        return refined
