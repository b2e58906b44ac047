"""From samples to a batch: one caption each, images of one size, and what is present."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from m2ae.data.dataset import Item
from m2ae.data.tokenizer import CONTEXT_LENGTH, Tokenizer
from m2ae.data.transforms import center_square, generator_for, resize

Augmentation = Callable[[Tensor, int, Generator], Tensor]
"""Called with an image uint8 [3, H, W], a size and a generator; returns uint8 [3, size, size]."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples as tensors.

    Attributes:
        ids: of the samples, B of them.
        inputs: `pixel_values` uint8 [B, 3, H, W]; `input_ids` int64 [B, T]; `text_mask` bool
            [B, T], True where there is no padding. Where a modality is absent the pixels are 0,
            the ids are padding and the mask is False.
        present: `image` and `text`, bool [B]: which samples have the modality.
        shortened: how many captions lost tokens.
    """

    ids: list[str]
    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    shortened: int

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device.

        Args:
            device: where the tensors go.

        Returns:
            A new batch; tensors that are there already are shared.
        """
        return Batch(
            ids=self.ids,
            inputs={name: value.to(device) for name, value in self.inputs.items()},
            present={name: value.to(device) for name, value in self.present.items()},
            shortened=self.shortened,
        )


class Collator:
    """The `collate_fn` of a `DataLoader` over items.

    What is random depends on seed, epoch and sample id only: not on the number of workers, the
    order or the batch size. `set_epoch` reaches workers that live on between epochs, too; call it
    before the loader is iterated, not during.

    Args:
        tokenizer: for the captions.
        img_size: side of the images in pixels, at least 1.
        train: draw one of a sample's captions and augment its image; otherwise take the first
            caption and the middle square of the image. Half of the draws take the first caption,
            which is what evaluation asks for, the others any.
        seed: of the run.
        context_length: the most tokens of a caption, with start and end; at least 2.
        augment: for images when `train`, such as `transforms.crop_and_jitter`; None: the middle
            square, as without `train`.

    Raises:
        ValueError: `img_size` is below 1 or `context_length` is below 2.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        img_size: int,
        train: bool,
        seed: int = 0,
        context_length: int = CONTEXT_LENGTH,
        augment: Augmentation | None = None,
    ) -> None:
        if img_size < 1:
            raise ValueError(f"Collator: expected img_size >= 1, got {img_size}")
        if context_length < 2:
            raise ValueError(f"Collator: expected context_length >= 2, got {context_length}")
        self.tokenizer = tokenizer
        self.img_size = img_size
        self.train = train
        self.seed = seed
        self.context_length = context_length
        self.augment = augment
        # In shared memory: a persistent worker holds a copy of this object, made at its start.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the captions and crops of an epoch.

        Args:
            epoch: from 0.

        Raises:
            ValueError: `epoch` is negative.
        """
        if epoch < 0:
            raise ValueError(f"set_epoch: expected epoch >= 0, got {epoch}")
        self._epoch.fill_(epoch)

    def __call__(self, items: Sequence[Item]) -> Batch:
        """Make a batch.

        Args:
            items: B samples, at least one.

        Returns:
            The batch, samples in the order of `items`.

        Raises:
            ValueError: `items` is empty.
        """
        if not items:
            raise ValueError("Collator: expected at least one item, got none")
        has_image = torch.tensor([item.image is not None for item in items])  # [B]
        has_text = torch.tensor([bool(item.text) for item in items])  # [B]
        captions, images = zip(*map(self._draw, items), strict=True)
        encoding = self.tokenizer(captions, context_length=self.context_length)
        absent = ~has_text[:, None]  # [B, 1]
        return Batch(
            ids=[item.id for item in items],
            inputs={
                "pixel_values": torch.stack(images),  # [B, 3, img_size, img_size]
                "input_ids": encoding.input_ids.masked_fill(absent, self.tokenizer.pad_id),
                "text_mask": encoding.text_mask & ~absent,
            },
            present={"image": has_image, "text": has_text},
            shortened=encoding.shortened,
        )

    def _draw(self, item: Item) -> tuple[str, Tensor]:
        """The caption of a sample ("" without text) and its image (zeros without one)."""
        generator = generator_for(self.seed, int(self._epoch), item.id)
        caption = item.text[0] if item.text else ""
        if self.train and item.text:
            drawn = int(torch.randint(2 * len(item.text), (), generator=generator))
            caption = item.text[drawn] if drawn < len(item.text) else item.text[0]
        if item.image is None:
            image = torch.zeros((3, self.img_size, self.img_size), dtype=torch.uint8)
        elif self.train and self.augment is not None:
            image = self.augment(item.image, self.img_size, generator)
        else:
            image = resize(center_square(item.image), self.img_size)
        return caption, image
