"""The op on this rank's queries and some of the keys: statistics, gradients, share of the loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from m2ae_kernels.distributed._keys import NO_TARGET, Keys
from m2ae_kernels.distributed._ranks import Ranks
from m2ae_kernels.distributed._statistics import Statistics, statistics


class Options(NamedTuple):
    """What is the same for all parts of the matrix."""

    same_id: int
    normalize: bool
    eps: float
    symmetric: bool
    allow_tf32: bool
    workspace: int
    spare: bool  # whether the last key is absent


class Queries(NamedTuple):
    """The side that stays."""

    features: Tensor  # [n, D]
    mask: Tensor | None  # [n] bool
    ids: Tensor | None  # [n] int64
    scale: Tensor  # []


class Part(NamedTuple):
    """What the op says of local queries and some keys."""

    rows: Statistics  # [n]
    columns: Statistics  # [m]
    rnorm_q: Tensor  # [n] or [0]
    rnorm_k: Tensor  # [m] or [0]


def compare(
    queries: Queries, keys: Keys, target: Tensor | None, offset: int, options: Options
) -> Part:
    outputs = torch.ops.m2ae_kernels.info_nce_loss(
        *(queries.features, keys.features, queries.scale, target),
        *(queries.mask, keys.mask, queries.ids, keys.ids, offset, NO_TARGET, options.same_id),
        *(False, options.normalize, options.eps, options.symmetric, False, False),
        *(options.allow_tf32, options.workspace),
    )
    loss_q, loss_k, neg_q, neg_k, pos_q, pos_k, num_q, num_k, rnorm_q, rnorm_k, *_ = outputs
    rows = statistics(loss_q, neg_q, pos_q, num_q)
    return Part(rows, statistics(loss_k, neg_k, pos_k, num_k), rnorm_q, rnorm_k)


def gradients(
    grad_q: Tensor,  # [n] upstream, of the loss of each row
    grad_k: Tensor,  # [m] or [0]
    queries: Queries,
    keys: Keys,
    target: Tensor | None,
    offset: int,
    whole: Part,  # its statistics over all keys, over all queries
    options: Options,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = whole.rows, whole.columns
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.m2ae_kernels.info_nce_loss_backward(
        *(grad_q, grad_k, queries.features, keys.features, queries.scale, target),
        *(queries.mask, keys.mask, queries.ids, keys.ids),
        *(rows.neg, columns.neg, rows.pos, columns.pos, rows.num, columns.num),
        *(whole.rnorm_q, whole.rnorm_k, rows.neg.new_empty(0), offset, NO_TARGET, options.same_id),
        *(False, options.normalize, options.eps, options.symmetric),
        *(options.allow_tf32, options.workspace, needed),
    )
    return grads


def share_of(rows: Statistics, columns: Statistics, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """This rank's share of the loss, and by what the losses of its rows and columns count in it.

    A loss counts the number of ranks times what it counts in the global mean, [2], or [1] if there
    are no columns.
    """
    sides = [rows, columns] if columns.num.numel() > 0 else [rows]
    counts = ranks.sum(torch.stack([(side.num > 0).sum() for side in sides]))
    factors = ranks.size / len(sides) / counts.clamp(min=1).to(rows.neg.dtype)
    sums = torch.stack([side.loss().sum() for side in sides])
    return (factors * sums).sum(), factors
