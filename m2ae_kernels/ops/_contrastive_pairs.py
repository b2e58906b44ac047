"""Which entries of the matrix of logits are positive, negative or absent; for contrastive losses.

Query i and key j are one pair of N x M. A pair is absent if its query or its key is masked out, or
if it is the query itself (exclude_self). Of the others those at the query's target are positive;
pairs of one id are, by choice, negative like any other, absent, or positive, too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from m2ae_kernels.ops._checks import expect_device, expect_dtype

SAME_ID = {"negative": 0, "ignore": 1, "positive": 2}


class Pairing(NamedTuple):
    """The arguments that say what each pair is, in the order in which the ops take them."""

    target: Tensor | None  # [N] int64, key of each query's positive; None is arange + target_offset
    query_mask: Tensor | None  # [N] bool
    key_mask: Tensor | None  # [M] bool
    query_ids: Tensor | None  # [N] int64
    key_ids: Tensor | None  # [M] int64
    target_offset: int
    ignore_index: int  # a query with this target has none
    same_id: int  # a value of SAME_ID
    exclude_self: bool  # the pairs (i, i + target_offset) are absent


def check_pairing(
    op: str,
    N: int,
    M: int,
    device: torch.device,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    target_offset: int,
    ignore_index: int,
    same_id: str,
    exclude_self: bool = False,
) -> Pairing:
    """The arguments, once they fit each other."""
    check_rows(op, "query_mask", query_mask, "N", N, torch.bool, device)
    check_rows(op, "key_mask", key_mask, "M", M, torch.bool, device)
    check_rows(op, "target", target, "N", N, torch.int64, device)
    check_rows(op, "query_ids", query_ids, "N", N, torch.int64, device)
    check_rows(op, "key_ids", key_ids, "M", M, torch.int64, device)
    if same_id not in SAME_ID:
        raise ValueError(
            f'{op}: expected same_id "negative", "ignore" or "positive", got {same_id!r}'
        )
    if (query_ids is None) != (key_ids is None):
        missing = "query_ids" if query_ids is None else "key_ids"
        raise ValueError(f"{op}: expected query_ids and key_ids together, got no {missing}")
    if same_id != "negative" and query_ids is None:
        raise ValueError(f"{op}: expected query_ids and key_ids with same_id={same_id!r}, got none")
    if (target is None or exclude_self) and (target_offset < 0 or target_offset + N > M):
        why = "with exclude_self" if exclude_self else "without a target"
        raise ValueError(
            f"{op}: expected target_offset + N <= M = {M} {why}, got {target_offset} + {N}"
        )
    if target is not None:
        _check_range(op, target, M, ignore_index)
    masks = (target, query_mask, key_mask, query_ids, key_ids)
    return Pairing(*masks, target_offset, ignore_index, SAME_ID[same_id], exclude_self)


def check_rows(
    op: str,
    name: str,
    rows: Tensor | None,
    letter: str,
    size: int,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """`rows`, if given, is one number per query or key."""
    if rows is None:
        return
    if rows.shape != (size,):
        raise ValueError(f"{op}: expected {name} [{letter} = {size}], got {list(rows.shape)}")
    expect_dtype(op, name, rows, dtype if isinstance(dtype, tuple) else (dtype,))
    expect_device(op, name, rows, "the features", device)


def _check_range(op: str, target: Tensor, M: int, ignore_index: int) -> None:
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= M))
    if wrong.any():
        raise ValueError(
            f"{op}: expected target in [0, M = {M}) or ignore_index, got {int(target[wrong][0])}"
        )


def targets(pairing: Pairing, N: int, M: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each query's target, [N] int64 in [0, M), and whether that is a pair that is not absent."""
    rows = torch.arange(N, device=device)
    if pairing.target is None:
        column, paired = rows + pairing.target_offset, torch.ones_like(rows, dtype=torch.bool)
    else:
        column = pairing.target
        paired = (column != pairing.ignore_index) & (column >= 0) & (column < M)
        column = torch.where(paired, column, 0)
    if pairing.query_mask is not None:
        paired = paired & pairing.query_mask
    if pairing.key_mask is not None and M > 0:
        paired = paired & pairing.key_mask[column]
    if pairing.exclude_self:
        paired = paired & (column != rows + pairing.target_offset)
    return column, paired


def entries(
    pairing: Pairing, N: int, M: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:  # bool [N, M] each
    """Which pairs are absent, which are positive, and which are a query with its target."""
    rows = torch.arange(N, device=device)[:, None]
    columns = torch.arange(M, device=device)
    column, paired = targets(pairing, N, M, device)
    at_target = torch.where(paired, column, -1)[:, None] == columns
    absent = torch.zeros(N, M, dtype=torch.bool, device=device)
    if pairing.query_mask is not None:
        absent = absent | ~pairing.query_mask[:, None]
    if pairing.key_mask is not None:
        absent = absent | ~pairing.key_mask
    if pairing.exclude_self:
        absent = absent | (columns == rows + pairing.target_offset)
    positive = at_target
    if pairing.same_id != SAME_ID["negative"]:
        assert pairing.query_ids is not None
        assert pairing.key_ids is not None
        same = pairing.query_ids[:, None] == pairing.key_ids
        if pairing.same_id == SAME_ID["ignore"]:
            absent = absent | (same & ~at_target)
        else:
            positive = (same & ~absent) | at_target
    return absent, positive, at_target
