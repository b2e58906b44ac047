"""One seed, one result."""

import os
import random

import numpy as np
import torch


def set_determinism(seed: int) -> None:
    """Make everything that is drawn and computed from here on depend on `seed`.

    On one machine, with one build of torch and one number of threads, two runs then give the same
    bits. Batches, crops and masks have generators of their own (seed, epoch, sample id).

    Args:
        seed: 0 <= seed < 2**32.

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected 0 <= seed < 2**32, got {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory is for finding bugs; here it would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
