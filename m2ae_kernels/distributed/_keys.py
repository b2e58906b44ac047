"""The side of a loss whose rows the other ranks need: of one length, and of one kind."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from m2ae_kernels.distributed._ranks import Ranks
from m2ae_kernels.ops._contrastive_arguments import FLOATING

GATHER = ("all_gather", "ring")
NO_TARGET = -100


def check_gather(function: str, gather: str) -> None:
    """`gather` is one of GATHER."""
    if gather not in GATHER:
        raise ValueError(f'{function}: expected gather "all_gather" or "ring", got {gather!r}')


class Keys(NamedTuple):
    """The side that visits the other ranks: as many rows on each."""

    features: Tensor  # [m, D]
    mask: Tensor | None  # [m] bool
    ids: Tensor | None  # [m] int64


def common_keys(
    function: str, ranks: Ranks, query_mask: Tensor | None, keys: Keys, even: bool, spare: int
) -> Keys:
    """The keys with absent rows at the end, so that all ranks have as many, `spare` at least.

    Unless told that the batches are even, the ranks first tell each other what they have. That is
    the only thing for which the host waits, and only for a device whose group knows no other way.
    """
    features, mask, ids = keys
    rows = [features.shape[0]]
    if not even:
        rows = _tell(function, ranks, query_mask, keys)
    if min(rows) == max(rows) and spare == 0:
        return keys
    added = max(rows) + spare - features.shape[0]
    if mask is None:
        mask = torch.ones(features.shape[0], dtype=torch.bool, device=features.device)
    return Keys(
        F.pad(features, (0, 0, 0, added)),
        torch.cat([mask, mask.new_zeros(added)]),
        None if ids is None else torch.cat([ids, ids.new_zeros(added)]),
    )


def _tell(function: str, ranks: Ranks, query_mask: Tensor | None, keys: Keys) -> list[int]:
    """The number of keys of each rank; raises on every rank if they differ in another respect."""
    features = keys.features
    given = [query_mask is not None, keys.mask is not None, keys.ids is not None]
    facts = [features.shape[0], features.shape[1], FLOATING.index(features.dtype), *given]
    by_host = "cpu:" in dist.get_backend_config(ranks.group)
    device = torch.device("cpu") if by_host else features.device
    told = torch.tensor([facts], dtype=torch.int64, device=device)
    rows, *others = ranks.all_gather(told).T.tolist()
    names = ("D", "the dtype of the features", "a query_mask", "a key_mask", "ids")
    for name, other in zip(names, others, strict=True):
        if len(set(other)) > 1:
            raise ValueError(
                f"{function}: expected every rank to agree on {name}, got {other} on ranks 0 to"
                f" {ranks.size - 1}"
            )
    return list(rows)
