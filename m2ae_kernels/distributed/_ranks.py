"""The ranks that share a loss, and what they tell each other."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(NamedTuple):
    """A process group, seen from one of its members. All its methods are collective."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @staticmethod
    def of(function: str, group: dist.ProcessGroup | None) -> "Ranks":
        """The ranks of `group`, None being all; one rank where torch.distributed is not in use."""
        if not (dist.is_available() and dist.is_initialized()):
            return Ranks(None, 0, 1)
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"{function}: expected a group that this rank is in, got another")
        return Ranks(group, rank, dist.get_world_size(group))

    def all_gather(self, rows: Tensor) -> Tensor:  # [n, ...] -> [size * n, ...]
        """The rows of all ranks, in the order of the ranks; every rank passes as many."""
        rows = rows.contiguous()
        gathered = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        if gathered.numel() > 0:
            _newest("all_gather_single", "all_gather_into_tensor")(gathered, rows, group=self.group)
        return gathered

    def reduce_scatter(self, rows: Tensor) -> Tensor:  # [size * n, ...] -> [n, ...]
        """The sum over the ranks of what each has for this one's rows."""
        rows = rows.contiguous()
        scattered = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        if scattered.numel() > 0:
            _newest("reduce_scatter_single", "reduce_scatter_tensor")(
                scattered, rows, group=self.group
            )
        return scattered

    def sum(self, numbers: Tensor) -> Tensor:
        """Over the ranks, of each number; in place."""
        if numbers.numel() > 0:
            dist.all_reduce(numbers, dist.ReduceOp.SUM, group=self.group)
        return numbers

    def maximum(self, numbers: Tensor) -> Tensor:
        """Over the ranks, of each number; in place."""
        if numbers.numel() > 0:
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return numbers

    def same_or_nan(self, number: Tensor) -> Tensor:  # []
        """`number`, or NaN if another rank has a different one."""
        numbers = self.all_gather(number.reshape(1))
        return torch.where((numbers == number).all(), number, torch.nan)

    def tour(
        self,
        visitor: Sequence[Tensor | None],
        visit: Callable[[Sequence[Any], bool], Sequence[Tensor]],
        add: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]],
    ) -> Sequence[Tensor]:
        """Each rank's visitor calls on every rank, in the order of the ranks, itself first.

        `visit` tells what a visitor gets at this rank, and `add` puts that to what it has so far.
        That travels behind it, and is returned where the visitor is at home. Visitors, and what
        they have, are under way while others are at work.
        """
        on_its_way, behind = None, None
        for step in range(self.size):
            if on_its_way is not None:
                visitor = on_its_way.wait()
            on_its_way = self._pass_on(visitor) if step < self.size - 1 else None
            got = visit(visitor, step == 0)
            if behind is not None:
                got = add(behind.wait(), got)
            behind = self._pass_on(got)
        assert behind is not None
        return behind.wait()

    def _pass_on(self, tensors: Sequence[Tensor | None]) -> "Passing":
        tensors = [None if sent is None else sent.contiguous() for sent in tensors]
        arriving = [None if sent is None else torch.empty_like(sent) for sent in tensors]
        operations = []
        for sent, received in zip(tensors, arriving, strict=True):
            if sent is not None and received is not None and sent.numel() > 0:
                operations += [
                    dist.P2POp(dist.isend, sent, self._peer(1), self.group),
                    dist.P2POp(dist.irecv, received, self._peer(-1), self.group),
                ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Passing(tensors, arriving, works)

    def _peer(self, steps: int) -> int:
        rank = (self.rank + steps) % self.size
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class Passing(NamedTuple):
    """Tensors on their way to the next rank, and those from the one before."""

    sent: Sequence[Tensor | None]  # kept until they have left
    arriving: list[Tensor | None]
    works: list[Any]  # torch.distributed.Work, which not every build of torch has

    def wait(self) -> list[Any]:
        """What has arrived."""
        for work in self.works:
            work.wait()
        return self.arriving


def _newest(name: str, old_name: str) -> Callable[..., Any]:
    """A collective that torch 2.13 renamed, with a warning where the old name is used."""
    function: Callable[..., Any] = getattr(dist, name if hasattr(dist, name) else old_name)
    return function


def added(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """The sums of tensors that belong together."""
    return [one + other for one, other in zip(first, second, strict=True)]


def global_value(share: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:  # []
    """The mean of the shares of all ranks, with the gradient of this one's."""
    ranks = Ranks.of("global_value", group)
    mean = ranks.sum(share.detach().clone()) / ranks.size if ranks.size > 1 else share.detach()
    return mean + (share - share.detach())


def check_ranks(module: str, rank: int, size: int) -> None:
    """A module's rank and world_size are those of the default process group."""
    ranks = Ranks.of(module, None)
    if (ranks.rank, ranks.size) != (rank, size):
        raise ValueError(
            f"{module}: expected rank and world_size of torch.distributed, {ranks.rank} and"
            f" {ranks.size}, got {rank} and {size}"
        )
