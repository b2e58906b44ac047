"""Inputs over all ranks, what a rank makes of its rows, and what one process makes of all."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import m2ae_kernels
from m2ae_kernels import distributed


@dataclass(frozen=True)
class Case:
    """A call of a loss; what is not said is the default."""

    op: str = "info_nce_loss"
    options: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = (4, 4, 4, 4)  # of each rank
    extra_keys: int = 0  # of each rank, nobody's positive
    alike: float = 2.0  # how much a key is like its query
    masks: bool = False
    ids: bool = False
    dtype: torch.dtype = torch.float32
    scale: float = 5.0


UNEVEN = (4, 7, 5, 6)
SIGLIP = "siglip_loss"
CASES = {
    "plain": Case(),
    "uneven": Case(rows=UNEVEN),
    "uneven, rows that are absent": Case(rows=UNEVEN, masks=True),
    "normalized": Case(options={"normalize": True}, scale=14.3),
    "normalized, uneven, absent": Case(options={"normalize": True}, rows=UNEVEN, masks=True),
    "one direction": Case(options={"symmetric": False}, extra_keys=2),
    "more keys, uneven": Case(rows=UNEVEN, extra_keys=3),
    "ids ignored": Case(options={"same_id": "ignore"}, ids=True, masks=True),
    "ids positive": Case(options={"same_id": "positive"}, ids=True),
    "ids positive, uneven, absent": Case(
        options={"same_id": "positive"}, ids=True, masks=True, rows=UNEVEN
    ),
    "a rank without rows": Case(rows=(3, 0, 5, 2)),
    "nearly converged": Case(options={"normalize": True}, scale=60.0, alike=50.0),
    "negative scale": Case(scale=-3.0),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16),
    "even batches, as promised": Case(options={"even_batches": True}),
    "sigmoid": Case(SIGLIP),
    "sigmoid, uneven, absent": Case(SIGLIP, rows=UNEVEN, masks=True),
    "sigmoid, normalized, more keys": Case(SIGLIP, {"normalize": True}, extra_keys=2),
    "sigmoid, ids ignored": Case(SIGLIP, {"same_id": "ignore"}, ids=True, masks=True),
    "sigmoid, ids positive": Case(SIGLIP, {"same_id": "positive"}, ids=True, rows=UNEVEN),
    "sigmoid, a rank without rows": Case(SIGLIP, rows=(3, 0, 5, 2)),
    "sigmoid, bfloat16": Case(SIGLIP, dtype=torch.bfloat16),
    "sigmoid, even batches": Case(SIGLIP, {"even_batches": True}),
}
D = 7
BIAS = -1.5


class Rows(NamedTuple):
    """Both sides of a batch, and what belongs to their rows."""

    query: Tensor  # [N, D]
    key: Tensor  # [M, D]
    query_mask: Tensor | None
    key_mask: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None


def batch(case: Case, size: int) -> tuple[list[Rows], Tensor]:
    """The rows of each rank, and where the positives of all queries are among all keys."""
    generator = torch.Generator().manual_seed(size)
    ranks, targets, before = [], [], 0
    for rank in range(size):
        n = case.rows[rank]
        m = n + case.extra_keys
        x = torch.randn(n, D, generator=generator)
        y = torch.randn(m, D, generator=generator)
        y[:n] += case.alike * x
        queries = torch.rand(n, generator=generator) > 0.3
        keys = torch.rand(m, generator=generator) > 0.3
        masks = (queries, keys) if case.masks else (None, None)
        ids = (
            torch.randint(3, (n,), generator=generator),
            torch.randint(3, (m,), generator=generator),
        )
        x, y = (of.mul(D**-0.5).to(case.dtype) for of in (x, y))
        ranks.append(Rows(x, y, *masks, *(ids if case.ids else (None, None))))
        targets.append(torch.arange(before, before + n))
        before += m
    return ranks, torch.cat(targets)


class Result(NamedTuple):
    """A loss and its gradients."""

    loss: Tensor
    query: Tensor
    key: Tensor
    scale: Tensor
    bias: Tensor


def on_rank(case: Case, gather: str, rank: int, size: int) -> Result:
    """This rank's share, and the gradients of this rank's rows, and of scale and bias, by it."""
    rows = batch(case, size)[0][rank]
    return result(getattr(distributed, case.op), case, rows, **case.options, gather=gather)


def of_one_process(case: Case, size: int) -> Result:
    """Loss and gradients of all rows by the reference, in float64 of the same numbers."""
    ranks, target = batch(case, size)
    rows = Rows(*(None if of[0] is None else torch.cat(of) for of in zip(*ranks, strict=True)))
    rows = rows._replace(query=rows.query.double(), key=rows.key.double())
    options = {key: value for key, value in case.options.items() if key != "even_batches"}
    return result(getattr(m2ae_kernels.reference, case.op), case, rows, **options, target=target)


def result(loss_of: Any, case: Case, rows: Rows, **options: Any) -> Result:
    query, key = rows.query.requires_grad_(), rows.key.requires_grad_()
    scale, bias = torch.tensor([case.scale, BIAS], dtype=torch.float64).unbind()
    if rows.query.dtype != torch.float64:
        scale, bias = scale.float(), bias.float()
    scale, bias = scale.requires_grad_(), bias.requires_grad_()
    given = {name: of for name, of in rows._asdict().items() if name not in ("query", "key")}
    loss = loss_of(query, key, scale, logit_bias=bias, **given, **options)
    loss.backward()
    return Result(loss.detach(), *(of.grad for of in (query, key, scale, bias)))
