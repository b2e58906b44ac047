"""Early fusion: pooled features of all modalities, concatenated, become one latent.

    z = W [v; t] + b = W_v v + W_t t + b

The weight is stored whole, as the concatenation has it, and applied block by block. A modality that
an item lacks is replaced by a learned vector, so unimodal latents, retrieval and missing modalities
are this one formula, with other rows chosen.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2ae.models.blocks import learned_vectors


class EarlyFusion(nn.Module):
    """A Linear on concatenated modalities, each of which may be absent.

    Args:
        widths: channels of each modality's pooled features, in the order of concatenation.
        latent_dim: channels L of the latent.
    """

    def __init__(self, widths: dict[str, int], latent_dim: int) -> None:
        super().__init__()
        self.widths = dict(widths)
        total = sum(widths.values())
        bound = 1 / math.sqrt(total)  # nn.Linear's initialization
        self.weight = nn.Parameter(torch.empty(latent_dim, total).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(latent_dim).uniform_(-bound, bound))
        self.absent = nn.ParameterDict({name: learned_vectors(D) for name, D in widths.items()})

    def forward(self, pooled: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Fuse what is present.

        Args:
            pooled: [B, D] for each modality that takes part, at least one. The others are absent
                in every row.
            present: [B] bool for each of `pooled`. Where it is False, what `pooled` holds there,
                NaN included, reaches neither the result nor a gradient.

        Returns:
            [B, L].
        """
        blocks = self.weight.split(list(self.widths.values()), dim=1)  # [L, D] each
        z: Tensor = self.bias
        for (name, absent), block in zip(self.absent.items(), blocks, strict=True):
            features: Tensor = absent  # [D]
            if name in pooled:
                features = torch.where(present[name][:, None], pooled[name], absent)  # [B, D]
            z = z + F.linear(features, block)
        return z  # [B, L]
