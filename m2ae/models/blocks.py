"""The parts that encoders, decoders and the predictor share.

Pre-norm transformer blocks as in ViT (Dosovitskiy et al. 2021) and MAE (He et al. 2022), a head
that spreads one vector over tokens, and mean pooling that knows about padding. In every mask here,
True is a token that counts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2ae.config import TokenActivation, TokenHeadKind

# Learned vectors that are added to or stand for activations start small beside them, as in BERT.
INIT_STD = 0.02


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself.

    Args:
        width: channels D.
        heads: H, a divisor of D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix tokens.

        Args:
            x: [B, N, D].
            mask: [B, N] bool; a token that is False is not attended to.

        Returns:
            [B, N, D]. In a row without any token that counts, the bias of the output.
        """
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, D / H] each
        keys = None if mask is None else mask[:, None, None, :]  # [B, 1, 1, N]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)  # [B, H, N, D / H]
        return self.out(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Sequential):
    """Linear, GELU, Linear.

    Args:
        width: channels in and out.
        hidden: channels between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        width: channels D.
        heads: attention heads, a divisor of D.
        mlp_ratio: hidden width of the MLP / D.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix tokens, then channels.

        Args:
            x: [B, N, D].
            mask: [B, N] bool; a token that is False is not attended to.

        Returns:
            [B, N, D].
        """
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Blocks and a final LayerNorm; at depth 0 there is neither, and tokens pass through.

    Args:
        width: channels D.
        depth: blocks, 0 or more.
        heads: attention heads of a block.
        mlp_ratio: hidden width of a block's MLP / D.
    """

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width) if depth else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix tokens.

        Args:
            x: [B, N, D].
            mask: [B, N] bool; a token that is False is not attended to.

        Returns:
            [B, N, D]. What stands at masked positions is of no use.
        """
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class TokenHead(nn.Module):
    """One vector becomes N tokens.

    "positional" projects the vector and adds a learned position to each copy; "linear" has a
    weight of its own for every token. A positional head without a nonlinearity behind it can only
    shift all tokens by the same amount; the activation, or the blocks that follow, change that.

    Args:
        latent_dim: channels L of the vector.
        num_tokens: N.
        width: channels D of a token.
        kind: "positional" or "linear".
        activation: "none" or "gelu", on the tokens.
    """

    def __init__(
        self,
        latent_dim: int,
        num_tokens: int,
        width: int,
        kind: TokenHeadKind,
        activation: TokenActivation,
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(latent_dim, width)
        self.spread = (
            AddPositions(num_tokens, width)
            if kind == "positional"
            else nn.Sequential(
                nn.Linear(width, num_tokens * width), nn.Unflatten(1, (num_tokens, width))
            )
        )
        self.activation = nn.GELU() if activation == "gelu" else nn.Identity()

    def forward(self, z: Tensor) -> Tensor:
        """Make tokens.

        Args:
            z: [B, L].

        Returns:
            [B, N, D].
        """
        return self.activation(self.spread(self.proj(z)))


class AddPositions(nn.Module):
    """One vector plus a learned position for each of N tokens.

    Args:
        num_tokens: N.
        width: channels D.
    """

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.positions = learned_vectors(num_tokens, width)

    def forward(self, x: Tensor) -> Tensor:
        """Copy and shift.

        Args:
            x: [B, D].

        Returns:
            [B, N, D].
        """
        return x[:, None, :] + self.positions


def learned_vectors(*shape: int) -> nn.Parameter:
    """Positions, mask tokens and the like: a parameter that starts small and random."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=INIT_STD))


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that count, whatever the others hold.

    Args:
        tokens: [B, N, D].
        mask: [B, N] bool, True = counts; None = all do.

    Returns:
        [B, D]; 0 for a row where none counts.
    """
    if mask is None:
        return tokens.mean(dim=1)
    total = torch.where(mask[..., None], tokens, 0).sum(dim=1)  # [B, D]
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)
