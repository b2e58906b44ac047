r"""M2AE: images and texts through one latent and back, with a JEPA branch on the image side.

    image -> ImageEncoder -> mean \                               / ImageDecoder -> image
                                   - EarlyFusion -> Bottleneck -
    text  -> TextEncoder  -> mean /                               \ TextDecoder  -> text

    visible patches -> ImageEncoder -> PatchPredictor -> features of masked patches
    all patches -> TargetEncoder (moving average of ImageEncoder) -> their targets

Objective: recon * L_recon + jepa * L_jepa + align * L_align, and cross * L_cross if wanted. L_align
compares image-only with text-only latents: the same fusion with the other modality replaced by its
absent vector. L_cross decodes each modality from the latent of the other alone.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2ae.config import M2AEConfig
from m2ae.dataclass_io import hint
from m2ae.losses.contrastive import AlignmentLoss
from m2ae.losses.jepa import jepa_loss
from m2ae.losses.reconstruction import image_reconstruction_loss, text_reconstruction_loss
from m2ae.masking import DenseMasks, MaskSpec
from m2ae.modalities.image import ImageDecoder, ImageEncoder, to_unit_range
from m2ae.modalities.text import TextDecoder, TextEncoder
from m2ae.models import sizes
from m2ae.models.bottleneck import Bottleneck
from m2ae.models.fusion import EarlyFusion
from m2ae.models.inputs import MODALITIES, CheckedInputs, check_masks
from m2ae.models.predictor import PatchPredictor
from m2ae.models.pretrained import PretrainedModel
from m2ae.models.target import TargetEncoder
from m2ae.outputs import Latents, M2AEOutput


class M2AE(PretrainedModel):
    """Multimodal autoencoder with a joint-embedding predictive branch.

    Args:
        config: every size and choice; kept as `self.config`.
    """

    config_type = M2AEConfig
    config: M2AEConfig

    def __init__(self, config: M2AEConfig) -> None:
        super().__init__()
        self.config = config
        image, text, jepa, L = config.image, config.text, config.jepa, config.latent_dim
        self.image_encoder = ImageEncoder(image)
        self.text_encoder = TextEncoder(text)
        self.fusion = EarlyFusion({"image": image.embed_dim, "text": text.width}, L)
        self.bottleneck = Bottleneck(config.bottleneck, L)
        self.align_proj = nn.Linear(L, config.align.dim) if config.align.dim else nn.Identity()
        self.alignment = AlignmentLoss(config.align)
        self.image_decoder = ImageDecoder(image, L)
        self.text_decoder = TextDecoder(text, L)
        self.target_encoder = TargetEncoder(self.image_encoder)
        self.predictor = PatchPredictor(
            image.embed_dim,
            image.num_patches,
            jepa.predictor_dim,
            jepa.predictor_depth,
            jepa.predictor_heads,
        )

    def forward(
        self,
        inputs: dict[str, Tensor],
        present: dict[str, Tensor] | None = None,
        *,
        masks: MaskSpec | None = None,
    ) -> M2AEOutput:
        """Encode, decode and compute the objective.

        Args:
            inputs: `pixel_values` [B, 3, H, W], uint8 or floats in [0, 1]; `input_ids` [B, T] int64
                with 1 <= T <= context_length, or `text_embeds` [B, T, width_in] in their place;
                `text_mask` [B, T] bool, True = a token (without it, all are). A modality may be
                left out.
            present: "image" and "text" to [B] bool, True = the item has this modality; without it,
                what is in `inputs` is present. Absent slots may hold anything, NaN included.
            masks: what the JEPA branch sees and predicts; None = the branch is not computed.

        Returns:
            Loss, raw terms, latents and reconstructions. Terms whose weight is 0, or for which no
            modality is given, are not computed and not listed.

        Raises:
            ValueError: a name or a shape is not as above.
            TypeError: a dtype is not as above.
        """
        batch = CheckedInputs.check(inputs, present, self.config)
        weights = self.config.loss
        image = batch.pixel_values
        text = self._text_embeds(batch)
        latents = self._latents(batch, text)
        given = list(latents.by_modality)

        terms: dict[str, tuple[float, Tensor]] = {}  # weight and raw value
        reconstructions: dict[str, Tensor] = {}
        if weights.recon > 0:
            reconstructions = self.decode(latents.joint, given)
            for name, value in self._errors(reconstructions, batch, text).items():
                terms[f"recon_{name}"] = weights.recon, value
        if weights.cross > 0 and len(given) == len(MODALITIES):
            imagined = self.decode(latents.by_modality["text"], ["image"])
            imagined |= self.decode(latents.by_modality["image"], ["text"])
            for name, value in self._errors(imagined, batch, text, pairs_only=True).items():
                terms[f"cross_{name}"] = weights.cross, value
        if weights.jepa > 0 and masks is not None and image is not None:
            terms["jepa"] = weights.jepa, self._jepa(image, batch.present["image"], masks)
        if weights.align > 0 and len(given) == len(MODALITIES):
            is_pair = batch.present["image"] & batch.present["text"]
            aligned = self.alignment(latents.aligned["image"], latents.aligned["text"], is_pair)
            terms["align"] = weights.align, aligned

        loss = latents.joint.new_zeros((), dtype=torch.float32)
        for weight, value in terms.values():
            loss = loss + weight * value
        losses = {name: value for name, (_, value) in terms.items()}
        return M2AEOutput(loss, losses, latents, reconstructions)

    def encode(
        self, inputs: dict[str, Tensor], present: dict[str, Tensor] | None = None
    ) -> Latents:
        """Latents of a batch.

        Args:
            inputs: as for `forward`.
            present: as for `forward`.

        Returns:
            The joint latent, and one for each modality of `inputs` alone. Where an item lacks a
            modality, its latent of that modality is that of an item without anything.
        """
        batch = CheckedInputs.check(inputs, present, self.config)
        return self._latents(batch, self._text_embeds(batch))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Latents of images alone, to compare with those of texts by their inner product.

        Args:
            pixel_values: [B, 3, H, W], uint8 or floats in [0, 1].

        Returns:
            [B, A] of unit norm; A is `align.dim`, or L if that is 0.

        Raises:
            ValueError: the shape is not as above.
            TypeError: the dtype is not as above.
        """
        return self.encode({"pixel_values": pixel_values}).aligned["image"]

    def encode_text(self, input_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Latents of texts alone, to compare with those of images by their inner product.

        Args:
            input_ids: [B, T] int64, 1 <= T <= context_length.
            text_mask: [B, T] bool, True = a token; without it, all are.

        Returns:
            [B, A] of unit norm, as `encode_image`.

        Raises:
            ValueError: a shape is not as above.
            TypeError: a dtype is not as above.
        """
        inputs = {"input_ids": input_ids}
        if text_mask is not None:
            inputs["text_mask"] = text_mask
        return self.encode(inputs).aligned["text"]

    def decode(self, z: Tensor, modalities: Iterable[str] = MODALITIES) -> dict[str, Tensor]:
        """Reconstruct modalities from latents.

        Args:
            z: [B, L], joint or of one modality (`Latents.joint`, `Latents.by_modality`).
            modalities: what to make, of "image" and "text".

        Returns:
            "image": [B, 3, H, W], clamped to [0, 1] in eval mode; "text": [B, context_length,
            width_in] token embeddings.

        Raises:
            ValueError: a modality is unknown.
        """
        decoders = {"image": self.image_decoder, "text": self.text_decoder}
        decoded = {}
        for name in modalities:
            if name not in decoders:
                known = hint(name, decoders)
                raise ValueError(f"M2AE.decode: expected known modalities, got {name!r}; {known}")
            decoded[name] = decoders[name](z)
        return decoded

    def compression_ratios(self) -> dict[str, float]:
        """How much smaller the latent is.

        Returns:
            "image" and "text" to: numbers in an image, or in the embeddings of a text of full
            length, / numbers in the latent.
        """
        return sizes.compression_ratios(self.config)

    def parameter_counts(self) -> dict[str, int]:
        """How many parameters each part has, trained or not.

        Returns:
            Name of the part to number of parameters; the numbers add up to all of the model's.
        """
        return sizes.parameter_counts(self)

    def _text_embeds(self, batch: CheckedInputs) -> Tensor | None:
        if batch.input_ids is None:
            return batch.text_embeds
        return self.text_encoder.embed(batch.input_ids)  # [B, T, width_in]

    def _latents(self, batch: CheckedInputs, text: Tensor | None) -> Latents:
        pooled: dict[str, Tensor] = {}
        if batch.pixel_values is not None:
            pooled["image"] = self.image_encoder(batch.pixel_values).pooled  # [B, D]
        if text is not None:
            pooled["text"] = self.text_encoder(text, batch.text_mask).pooled  # [B, width]
        joint = self.bottleneck(self.fusion(pooled, batch.present))  # [B, L]
        by_modality = {
            name: self.bottleneck(self.fusion({name: features}, batch.present))
            for name, features in pooled.items()
        }
        aligned = {name: F.normalize(self.align_proj(z), dim=-1) for name, z in by_modality.items()}
        return Latents(joint, by_modality, aligned, batch.present)

    def _errors(
        self,
        decoded: dict[str, Tensor],
        batch: CheckedInputs,
        text: Tensor | None,
        *,
        pairs_only: bool = False,
    ) -> dict[str, Tensor]:
        """Reconstruction losses of what was decoded, over items that have it (or have both)."""
        has = batch.present
        if pairs_only:
            has = dict.fromkeys(MODALITIES, has["image"] & has["text"])
        errors = {}
        if "image" in decoded and batch.pixel_values is not None:
            target = to_unit_range(batch.pixel_values)
            errors["image"] = image_reconstruction_loss(decoded["image"], target, has["image"])
        if "text" in decoded and text is not None:
            mask = batch.text_mask & has["text"][:, None]  # [B, T]
            errors["text"] = text_reconstruction_loss(decoded["text"], text, mask)
        return errors

    def _jepa(self, image: Tensor, present: Tensor, masks: MaskSpec) -> Tensor:
        check_masks(masks, len(image), self.config.image.num_patches)
        target = self.target_encoder(image)  # [B, N, D]
        if isinstance(masks, DenseMasks):
            context = self.image_encoder(image, visible=masks.visible).tokens  # [B, N, D]
            is_masked = ~masks.visible & present[:, None]
        else:
            context = self.image_encoder(image, keep_idx=masks.keep_idx).tokens  # [B, K, D]
            index = masks.predict_idx.long()[..., None].expand(-1, -1, target.shape[-1])
            target = target.gather(1, index)  # [B, M, D]
            is_masked = present[:, None].expand_as(masks.predict_idx)
        prediction = self.predictor(context, masks)  # [B, M, D], or [B, N, D] if dense
        return jepa_loss(prediction, target, is_masked, self.config.jepa.pred_loss)
