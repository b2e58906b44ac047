"""How a trained M2AE does on samples it has not seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m2ae.data.collate import Collator
from m2ae.data.dataset import Item
from m2ae.evaluation.reconstruction import mean_image_psnr, psnr
from m2ae.evaluation.retrieval import (
    RetrievalMetrics,
    category_only,
    confidence_interval,
    retrieval_metrics,
)
from m2ae.models.m2ae import M2AE

DIRECTIONS = ("image to text", "text to image")


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Figures and what they were computed from, n samples that have both modalities."""

    retrieval: dict[str, RetrievalMetrics]  # by direction
    category: dict[int, float] | None  # recall in percent of knowing the label and nothing else
    psnr: dict[str, float]  # mean dB: from "image and text", "image" or "text" alone, "mean image"
    images: Tensor  # [n, 3, H, W] floats in [0, 1], the originals
    reconstructions: dict[str, Tensor]  # as `images`, by what they were made from
    similarities: Tensor  # [n, n] cosine of image-only (rows) and text-only latents
    captions: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON; intervals are 95 % bootstraps over the samples."""
        recalls = {
            direction: {
                "protocol": metrics.protocol,
                "median_rank": metrics.median_rank,
                "ties_for_the_query": metrics.optimistic_recall,  # None: no ties that matter
                **{
                    f"R@{k}": {
                        "percent": metrics.recall[k],
                        "interval": confidence_interval(metrics.ranks <= k, seed=0),
                        "chance": metrics.chance[k],
                        "category_only": None if self.category is None else self.category[k],
                    }
                    for k in metrics.recall
                },
            }
            for direction, metrics in self.retrieval.items()
        }
        return {"retrieval": recalls, "psnr_db": self.psnr}


@torch.no_grad()
def evaluate_held_out(
    model: M2AE,
    items: Sequence[Item],
    collator: Collator,
    train_items: Sequence[Item],
    batch_size: int = 128,
) -> HeldOut:
    """Retrieve and reconstruct.

    Args:
        model: in eval mode.
        items: held-out samples; those without an image or a caption are left out.
        collator: with `train=False`.
        train_items: for the mean image.
        batch_size: samples at a time.

    Returns:
        The figures.

    Raises:
        ValueError: no sample has both modalities.
    """
    pairs = [item for item in items if item.image is not None and item.text]
    if not pairs:
        raise ValueError("evaluate_held_out: expected samples with image and text, got none")
    device = next(model.parameters()).device
    aligned: dict[str, list[Tensor]] = {"image": [], "text": []}
    images: list[Tensor] = []
    made: dict[str, list[Tensor]] = {"image and text": [], "image": [], "text": []}
    for first in range(0, len(pairs), batch_size):
        batch = collator(pairs[first : first + batch_size]).to(device)
        latents = model.encode(batch.inputs, batch.present)
        for name, rows in latents.aligned.items():
            aligned[name].append(rows.cpu())
        images.append(batch.inputs["pixel_values"].cpu().float() / 255)
        for name, z in {"image and text": latents.joint, **latents.by_modality}.items():
            made[name].append(model.decode(z, ["image"])["image"].cpu())

    originals = torch.cat(images)  # [n, 3, H, W]
    image, text = torch.cat(aligned["image"]), torch.cat(aligned["text"])  # [n, A]
    reconstructions = {name: torch.cat(parts) for name, parts in made.items()}
    errors = {name: psnr(made, originals).mean().item() for name, made in reconstructions.items()}
    train_images = _images(train_items, collator)
    errors["mean image"] = mean_image_psnr(train_images, originals).mean().item()
    labels = [item.label for item in pairs if item.label]
    return HeldOut(
        retrieval={
            "image to text": retrieval_metrics(image, text),
            "text to image": retrieval_metrics(text, image),
        },
        category=category_only(labels, labels) if len(labels) == len(pairs) else None,
        psnr=errors,
        images=originals,
        reconstructions=reconstructions,
        similarities=image @ text.T,
        captions=[item.text[0] for item in pairs],
    )


def _images(items: Sequence[Item], collator: Collator) -> Tensor:
    """Images as the model sees them, floats in [0, 1], [n, 3, H, W]."""
    with_image = [item for item in items if item.image is not None]
    return collator(with_image).inputs["pixel_values"].float() / 255
