"""What encoders and models return."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class EncoderOutput:
    """What an encoder makes of one modality."""

    tokens: Tensor  # [B, N, D] features of patches or words
    mask: Tensor | None  # [B, N] bool, True = a token that counts; None = all of them
    pooled: Tensor  # [B, D] mean of the tokens that count


@dataclass
class Latents:
    """The bottleneck's latents of a batch, L channels each."""

    joint: Tensor  # [B, L] of all modalities that an item has
    by_modality: dict[str, Tensor]  # [B, L] of one modality, the others replaced by absent vectors
    aligned: dict[str, Tensor]  # [B, A] of one modality, unit norm: comparable across modalities
    present: dict[str, Tensor]  # [B] bool, True = the item has this modality


@dataclass
class M2AEOutput:
    """What a forward pass returns: the objective, its terms and what they were computed from."""

    loss: Tensor  # 0-d float32, the weighted sum of the terms
    losses: dict[str, Tensor]  # raw terms, 0-d float32: recon_image, recon_text, jepa, align, ...
    latents: Latents
    reconstructions: dict[str, Tensor] = field(default_factory=dict)  # from the joint latent


@dataclass
class ConnectorOutput:
    """What a connector makes of one modality's latents for another modality."""

    prediction: Tensor  # [B, d_target] of the target's latent, pooled
    query: Tensor  # [B, d] to compare with keys of the target by cosine
    routing: dict[str, Tensor]  # of both tasks: logsumexp, entropy, probs_sum, tokens_per_expert
