"""Which patches the context encoder sees, and which the predictor must tell.

A mask depends on (seed, epoch, sample id) alone, never on the batch around the sample, on the
number of workers or on how often something else was drawn: every sample has its own generator.

`bernoulli` masks each patch on its own, so that counts differ from row to row and the computation
stays dense. `fixed_ratio` and `multiblock` keep the same number in every row, so that masked
patches need not be computed at all. `multiblock`: Assran et al. 2023, "Self-supervised learning
from images with a joint-embedding predictive architecture" (I-JEPA), section 3.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m2ae.config import JEPAConfig


@dataclass(frozen=True)
class IndexMasks:
    """Equal counts in every row: indices of patches."""

    keep_idx: Tensor  # [B, K] int32, patches the context encoder sees, ascending
    predict_idx: Tensor  # [B, M] int32, patches to predict

    def to(self, device: torch.device | str) -> "IndexMasks":
        """The same masks on another device."""
        return IndexMasks(self.keep_idx.to(device), self.predict_idx.to(device))


@dataclass(frozen=True)
class DenseMasks:
    """Any count in every row: one bool per patch."""

    visible: Tensor  # [B, N] bool, True = the context encoder sees it, False = to predict

    def to(self, device: torch.device | str) -> "DenseMasks":
        """The same masks on another device."""
        return DenseMasks(self.visible.to(device))


MaskSpec = IndexMasks | DenseMasks
SampleId = int | str


def bernoulli(
    sample_ids: Sequence[SampleId], num_patches: int, mask_ratio: float, *, seed: int, epoch: int
) -> DenseMasks:
    """Mask each patch on its own with probability `mask_ratio`.

    Args:
        sample_ids: names of the B samples, or their numbers >= 0.
        num_patches: N.
        mask_ratio: probability in [0, 1] that a patch is masked.
        seed: >= 0, of the run.
        epoch: >= 0; each epoch masks anew.

    Returns:
        Masks [B, N]. A row may, with probability mask_ratio^N, keep nothing.
    """
    visible = np.empty((len(sample_ids), num_patches), dtype=bool)
    for row, sample_id in enumerate(sample_ids):
        visible[row] = _generator(seed, epoch, sample_id).random(num_patches) >= mask_ratio
    return DenseMasks(torch.from_numpy(visible))


def fixed_ratio(
    sample_ids: Sequence[SampleId], num_patches: int, mask_ratio: float, *, seed: int, epoch: int
) -> IndexMasks:
    """Mask the same number of patches in every row, all subsets of that size equally likely.

    Args:
        sample_ids: names of the B samples, or their numbers >= 0.
        num_patches: N.
        mask_ratio: masked share; M = round(N * mask_ratio) patches are masked, K = N - M kept.
        seed: >= 0, of the run.
        epoch: >= 0; each epoch masks anew.

    Returns:
        keep_idx [B, K] and its complement predict_idx [B, M], both ascending.

    Raises:
        ValueError: the ratio leaves nothing to keep or nothing to predict.
    """
    masked = round(num_patches * mask_ratio)
    if not 0 < masked < num_patches:
        raise ValueError(
            f"fixed_ratio: expected a mask_ratio that masks 1 to {num_patches - 1} of"
            f" {num_patches} patches, got {mask_ratio}, which masks {masked}"
        )
    order = np.empty((len(sample_ids), num_patches), dtype=np.int32)
    for row, sample_id in enumerate(sample_ids):
        order[row] = _generator(seed, epoch, sample_id).permutation(num_patches)
    return IndexMasks(_ascending(order[:, masked:]), _ascending(order[:, :masked]))


def multiblock(
    sample_ids: Sequence[SampleId],
    grid: tuple[int, int],
    *,
    seed: int,
    epoch: int,
    num_blocks: int = 4,
    block_scale: tuple[float, float] = (0.15, 0.2),
    block_aspect: tuple[float, float] = (0.75, 1.5),
) -> IndexMasks:
    """Mask blocks of patches, which may overlap; the context lies outside all of them.

    The blocks' size is drawn once an epoch, their places are drawn for every sample. The context is
    a random subset of what the blocks leave, of the size that is left when no two blocks overlap:
    so K depends neither on the batch nor on luck, where I-JEPA cuts every context to the shortest
    of its batch.

    Args:
        sample_ids: names of the B samples, or their numbers >= 0.
        grid: rows and columns of patches.
        seed: >= 0, of the run.
        epoch: >= 0; each epoch masks anew.
        num_blocks: blocks of a sample.
        block_scale: least and largest share of the image in one block.
        block_aspect: least and largest height / width of a block.

    Returns:
        keep_idx [B, K], ascending, K = N - num_blocks * h * w; predict_idx [B, num_blocks * h * w],
        block after block, so a patch of two blocks is there twice.

    Raises:
        ValueError: blocks of this size leave no context.
    """
    rows, columns = grid
    size = _generator(seed, epoch)
    area = rows * columns * size.uniform(*block_scale)
    aspect = math.exp(size.uniform(math.log(block_aspect[0]), math.log(block_aspect[1])))
    h = min(max(round(math.sqrt(area * aspect)), 1), rows)
    # On a coarse grid, two sides rounded up may be far more than the largest share.
    widest = int(rows * columns * block_scale[1] / h)
    w = max(min(round(math.sqrt(area / aspect)), widest, columns), 1)
    kept = rows * columns - num_blocks * h * w
    if kept < 1:
        raise ValueError(
            f"multiblock: expected blocks that leave a context, got {num_blocks} blocks of {h} x"
            f" {w} on a grid of {rows} x {columns} patches"
        )
    places = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    keep = np.empty((len(sample_ids), kept), dtype=np.int32)
    predict = np.empty((len(sample_ids), num_blocks, h, w), dtype=np.int32)
    for row, sample_id in enumerate(sample_ids):
        draw = _generator(seed, epoch, sample_id)
        for block in range(num_blocks):
            top, left = draw.integers(rows - h + 1), draw.integers(columns - w + 1)
            predict[row, block] = places[top : top + h, left : left + w]
        is_left = np.ones(rows * columns, dtype=bool)
        is_left[predict[row]] = False
        keep[row] = draw.permutation(np.flatnonzero(is_left))[:kept]
    return IndexMasks(
        _ascending(keep), torch.from_numpy(predict.reshape(len(sample_ids), num_blocks * h * w))
    )


def draw_masks(
    config: JEPAConfig,
    grid: tuple[int, int],
    sample_ids: Sequence[SampleId],
    *,
    seed: int,
    epoch: int,
) -> MaskSpec:
    """Masks of the kind that `config.masking` names.

    Args:
        config: `masking` and `mask_ratio` are used.
        grid: rows and columns of patches, `ImageConfig.grid`.
        sample_ids: names of the B samples, or their numbers >= 0.
        seed: >= 0, of the run.
        epoch: >= 0; each epoch masks anew.

    Returns:
        Masks on the CPU; `.to(device)` moves them.
    """
    if config.masking == "multiblock":
        return multiblock(sample_ids, grid, seed=seed, epoch=epoch)
    draw = bernoulli if config.masking == "bernoulli" else fixed_ratio
    return draw(sample_ids, grid[0] * grid[1], config.mask_ratio, seed=seed, epoch=epoch)


def _generator(seed: int, epoch: int, *sample_id: SampleId) -> np.random.Generator:
    # The length is part of the key: an epoch's own stream is not that of one of its samples.
    key = [_number(part) for part in sample_id]
    return np.random.default_rng([len(key), int(seed), int(epoch), *key])


def _number(sample_id: SampleId) -> int:
    if isinstance(sample_id, str):  # hash() differs from process to process
        digest = hashlib.blake2b(sample_id.encode(), digest_size=16).digest()
        return int.from_bytes(digest, "little")
    return int(sample_id)


def _ascending(indices: np.ndarray) -> Tensor:  # [B, K]
    return torch.from_numpy(np.sort(indices, axis=1))
