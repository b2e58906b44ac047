"""The target encoder: an exponential moving average of the context encoder.

Frozen to gradients, moved by averages (Grill et al. 2020, BYOL; Assran et al. 2023, I-JEPA).
"""

import copy
from typing import Generic, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2ae_kernels import ema_update_

Encoder = TypeVar("Encoder", bound=nn.Module)


class TargetEncoder(nn.Module, Generic[Encoder]):
    """A copy of an encoder that follows it.

    Its parameters have requires_grad False and it is always in eval mode. They are saved with the
    model, under `encoder.`.

    Args:
        source: the encoder to copy and to follow; it returns an EncoderOutput.
    """

    def __init__(self, source: Encoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(source).requires_grad_(False).eval()
        self._source = (source,)  # in a tuple, it is no submodule: not saved or counted twice

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the model around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Target features of whole images.

        Args:
            pixel_values: [B, 3, H, W].

        Returns:
            [B, N, D], each token normalized to mean 0 and variance 1; no gradient.
        """
        tokens = self.encoder(pixel_values).tokens
        return F.layer_norm(tokens, tokens.shape[-1:])

    @torch.no_grad()
    def update(self, decay: float | Tensor) -> None:
        """Move towards the source: target = decay * target + (1 - decay) * source.

        Args:
            decay: weight of the old target, in [0, 1], a float or a 0-d float64 tensor. At 1 the
                target stays as it is, bit for bit. Buffers are copied.
        """
        (source,) = self._source
        new = dict(source.named_parameters())
        old = dict(self.encoder.named_parameters())
        ema_update_(list(old.values()), [new[name] for name in old], decay)
        buffers = dict(source.named_buffers())
        for name, buffer in self.encoder.named_buffers():
            buffer.copy_(buffers[name])
