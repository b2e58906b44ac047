"""What the model is given, checked once and made safe.

Absent items may hold anything. Before any arithmetic their content is replaced, because a NaN that
was multiplied by 0 is still a NaN, in the result and in every gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m2ae.config import ImageConfig, M2AEConfig, TextConfig
from m2ae.dataclass_io import hint
from m2ae.masking import DenseMasks, MaskSpec

MODALITIES = ("image", "text")
KEYS = ("pixel_values", "input_ids", "text_embeds", "text_mask")


@dataclass(frozen=True)
class CheckedInputs:
    """Checked inputs; a modality that is not there at all is None."""

    present: dict[str, Tensor]  # [B] bool, True = the item has this modality; always both
    pixel_values: Tensor | None  # [B, 3, H, W] uint8 or floating; 0 where absent
    input_ids: Tensor | None  # [B, T] int64; 0 where absent or padding
    text_embeds: Tensor | None  # [B, T, width_in]; 0 where absent or padding
    text_mask: Tensor  # [B, T] bool; False where absent

    @classmethod
    def check(
        cls, inputs: dict[str, Tensor], present: dict[str, Tensor] | None, config: M2AEConfig
    ) -> "CheckedInputs":
        """Check inputs against the config and neutralize what is absent.

        A text without any token counts as absent.

        Args:
            inputs: as `M2AE.forward` documents them.
            present: as `M2AE.forward` documents it.
            config: the sizes to expect.

        Returns:
            The checked inputs.

        Raises:
            ValueError: a key is unknown, none is given, both or neither kind of text is, or a shape
                is not as the config says.
            TypeError: a dtype is not as documented.
        """
        _check_keys(inputs)
        sizes = {name: len(inputs[name]) for name in KEYS if name in inputs and inputs[name].ndim}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"M2AE: expected as many items in every input, got {sizes}")
        B = next(iter(sizes.values()), 0)
        device = next(iter(inputs.values())).device
        has = _check_present(present, B, device)

        pixel_values = inputs.get("pixel_values")
        if pixel_values is None:
            has["image"] = torch.zeros(B, dtype=torch.bool, device=device)
        else:
            _check_pixels(pixel_values, config.image)
            pixel_values = torch.where(has["image"][:, None, None, None], pixel_values, 0)

        input_ids, text_embeds = inputs.get("input_ids"), inputs.get("text_embeds")
        if input_ids is not None:
            _check_ids(input_ids, config.text)
            text_mask = _check_text_mask(inputs.get("text_mask"), input_ids)
        elif text_embeds is not None:
            _check_embeds(text_embeds, config.text)
            text_mask = _check_text_mask(inputs.get("text_mask"), text_embeds)
        else:
            text_mask = torch.zeros(B, 1, dtype=torch.bool, device=device)
        text_mask = text_mask & has["text"][:, None]
        has["text"] = text_mask.any(dim=1)
        if input_ids is not None:
            input_ids = torch.where(text_mask, input_ids, 0)
        if text_embeds is not None:
            text_embeds = torch.where(text_mask[..., None], text_embeds, 0)
        return cls(has, pixel_values, input_ids, text_embeds, text_mask)


def check_masks(masks: MaskSpec, batch_size: int, num_patches: int) -> None:
    """Check that masks belong to a batch of images.

    Args:
        masks: what is visible and what to predict.
        batch_size: B.
        num_patches: N.

    Raises:
        ValueError: the masks are for another number of images or patches.
    """
    if isinstance(masks, DenseMasks):
        wanted = (batch_size, num_patches)
        _check_shape("masks.visible", masks.visible, wanted, str(list(wanted)))
        return
    for name, index in (("keep_idx", masks.keep_idx), ("predict_idx", masks.predict_idx)):
        wanted = (batch_size, *index.shape[1:2])
        _check_shape(f"masks.{name}", index, wanted, f"[{batch_size}, patches]")


def _check_keys(inputs: dict[str, Tensor]) -> None:
    for key, value in inputs.items():
        if key not in KEYS:
            raise ValueError(f"M2AE: expected known inputs, got {key!r}; {hint(key, KEYS)}")
        if not isinstance(value, Tensor):
            raise TypeError(
                f"M2AE: expected inputs[{key!r}] as a tensor, got {type(value).__name__}"
            )
    texts = [key for key in ("input_ids", "text_embeds") if key in inputs]
    if len(texts) == 2:
        raise ValueError("M2AE: expected inputs['input_ids'] or ['text_embeds'], got both")
    if "text_mask" in inputs and not texts:
        raise ValueError("M2AE: expected input_ids or text_embeds with text_mask, got neither")
    if not texts and "pixel_values" not in inputs:
        raise ValueError("M2AE: expected pixel_values, input_ids or text_embeds, got no inputs")


def _check_present(
    present: dict[str, Tensor] | None, B: int, device: torch.device
) -> dict[str, Tensor]:
    everywhere = torch.ones(B, dtype=torch.bool, device=device)
    checked = dict.fromkeys(MODALITIES, everywhere)
    for name, value in (present or {}).items():
        if name not in MODALITIES:
            known = hint(name, MODALITIES)
            raise ValueError(f"M2AE: expected known modalities, got present[{name!r}]; {known}")
        if value.dtype != torch.bool:
            raise TypeError(f"M2AE: expected present[{name!r}] as bool, got {value.dtype}")
        _check_shape(f"present[{name!r}]", value, (B,), f"[{B}]")
        checked[name] = value
    return checked


def _check_pixels(pixel_values: Tensor, config: ImageConfig) -> None:
    side = config.img_size
    wanted = (*pixel_values.shape[:1], 3, side, side)
    _check_shape("pixel_values", pixel_values, wanted, f"[B, 3, {side}, {side}]")
    if pixel_values.dtype != torch.uint8 and not pixel_values.is_floating_point():
        raise TypeError(
            f"M2AE: expected pixel_values as uint8, or floating in [0, 1], got {pixel_values.dtype}"
        )


def _check_ids(input_ids: Tensor, config: TextConfig) -> None:
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"M2AE: expected input_ids as int64, got {input_ids.dtype}")
    _check_shape("input_ids", input_ids, tuple(input_ids.shape[:2]), "[B, T]")
    _check_length("input_ids", input_ids, config.context_length)


def _check_embeds(text_embeds: Tensor, config: TextConfig) -> None:
    if not text_embeds.is_floating_point():
        raise TypeError(f"M2AE: expected text_embeds as floating, got {text_embeds.dtype}")
    W = config.width_in
    _check_shape("text_embeds", text_embeds, (*text_embeds.shape[:2], W), f"[B, T, {W}]")
    _check_length("text_embeds", text_embeds, config.context_length)


def _check_length(name: str, text: Tensor, limit: int) -> None:
    if text.ndim < 2:
        raise ValueError(f"M2AE: expected {name} of shape [B, T], got {list(text.shape)}")
    if not 1 <= text.shape[1] <= limit:
        raise ValueError(
            f"M2AE: expected 1 to {limit} tokens in {name}, got {text.shape[1]}; cut longer texts"
            " where they are tokenized, so that the end token is kept"
        )


def _check_text_mask(mask: Tensor | None, text: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    if mask.dtype != torch.bool:
        raise TypeError(f"M2AE: expected text_mask as bool, got {mask.dtype}")
    _check_shape("text_mask", mask, tuple(text.shape[:2]), str(list(text.shape[:2])))
    return mask


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], wanted: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"M2AE: expected {name} of shape {wanted}, got {list(tensor.shape)}")
