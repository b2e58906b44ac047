"""A model that is small but has every part, and what tests do with it."""

import dataclasses

from m2ae.config import ImageConfig, JEPAConfig, M2AEConfig, TextConfig
from m2ae.masking import draw_masks
from m2ae.models.m2ae import M2AE

SMALL = M2AEConfig(
    latent_dim=20,
    image=ImageConfig(img_size=32, patch_size=8, embed_dim=24, depth=2, decoder_depth=1, heads=3),
    text=TextConfig(
        context_length=10, vocab_size=50, width_in=12, width=16, depth=2, decoder_depth=1, heads=2
    ),
    jepa=JEPAConfig(predictor_dim=16, predictor_depth=1, predictor_heads=2),
)
PATCHES = SMALL.image.num_patches


def masks_for(model, B, masking="fixed_ratio"):
    """Masks of the samples 0 to B - 1."""
    jepa = dataclasses.replace(model.config.jepa, masking=masking)
    return draw_masks(jepa, model.config.image.grid, range(B), seed=0, epoch=0)


def with_config(model, **changes):
    """A new model like `model`, with other parts of its config."""
    return M2AE(dataclasses.replace(model.config, **changes))


def gradients(model, output):
    """Gradients of the loss, by parameter name."""
    model.zero_grad()
    output.loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
