"""Texts: token ids or embeddings to a pooled vector, and a latent back to token embeddings."""

from torch import Tensor, nn

from m2ae.config import TextConfig
from m2ae.models.blocks import TokenHead, Transformer, learned_vectors, masked_mean
from m2ae.outputs import EncoderOutput


class TextEncoder(nn.Module):
    """Token embeddings to features.

    Args:
        config: sizes, and whether the embedding table learns.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.width_in)
        self.table.requires_grad_(config.train_table)
        self.proj = nn.Linear(config.width_in, config.width)
        # Without blocks, positions would only add their mean.
        self.positions = (
            learned_vectors(config.context_length, config.width) if config.depth else None
        )
        self.transformer = Transformer(config.width, config.depth, config.heads, config.mlp_ratio)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] to embeddings [B, T, width_in]."""
        return self.table(input_ids)

    def forward(self, text_embeds: Tensor, mask: Tensor | None = None) -> EncoderOutput:
        """Encode texts.

        Args:
            text_embeds: [B, T, width_in], of `embed` or of another model.
            mask: [B, T] bool, True = a token, False = padding, whose content has no influence.

        Returns:
            tokens [B, T, width], mask, pooled [B, width].
        """
        tokens = self.proj(text_embeds)  # [B, T, width]
        if self.positions is not None:
            tokens = tokens + self.positions[: tokens.shape[1]]
        tokens = self.transformer(tokens, mask)
        return EncoderOutput(tokens, mask, masked_mean(tokens, mask))


class TextDecoder(nn.Module):
    """A latent to token embeddings.

    Args:
        config: sizes and the token head.
        latent_dim: channels L of the latent.
    """

    def __init__(self, config: TextConfig, latent_dim: int) -> None:
        super().__init__()
        self.token_head = TokenHead(
            latent_dim,
            config.context_length,
            config.width,
            config.token_head,
            config.token_activation,
        )
        self.transformer = Transformer(
            config.width, config.decoder_depth, config.heads, config.mlp_ratio
        )
        self.proj = nn.Linear(config.width, config.width_in)

    def forward(self, z: Tensor) -> Tensor:
        """Write texts.

        Args:
            z: [B, L].

        Returns:
            [B, 77, width_in] for a context of 77 tokens: embeddings, of which the nearest row of
            the table is the token.
        """
        return self.proj(self.transformer(self.token_head(z)))
