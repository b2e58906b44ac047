"""Processes that run one function after another as the ranks of a gloo group on this machine.

They start once: importing torch takes them longer than all that the tests ask of them.
"""

import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

LIMIT = 120  # seconds, start included: 10 on an idle machine, more on a busy one
RANKS = 4


class RankProcesses:
    """At most RANKS ranks."""

    def __init__(self, folder: Path) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.folder, self.runs = folder, 0
        self.ends, self.processes = [], []
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            self.ends.append(here)
            self.processes.append(process)

    def run(self, size: int, function: Callable[[int, int], Any]) -> list[Any]:
        """What `function(rank, size)` returns on each of `size` ranks."""
        self.runs += 1
        folder = self.folder / str(self.runs)
        folder.mkdir()
        for end in self.ends[:size]:
            end.send((size, function, str(folder)))
        deadline = time.monotonic() + LIMIT
        for rank, end in enumerate(self.ends[:size]):
            if not end.poll(max(0, deadline - time.monotonic())):
                self.stop()
                raise TimeoutError(f"rank {rank} of {size} has no result after {LIMIT} s")
            if (error := end.recv()) is not None:
                self.stop()  # the other ranks may wait for this one
                raise RuntimeError(f"rank {rank} of {size}: {error}")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]

    def stop(self) -> None:
        """End the processes, whatever they do."""
        for process in self.processes:
            process.kill()


def _serve(rank: int, commands: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    while True:
        try:
            size, function, folder = commands.recv()
        except EOFError:  # the tests have ended
            return
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/meeting",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=LIMIT),
            )
            torch.save(function(rank, size), Path(folder) / f"{rank}.pt")
            dist.destroy_process_group()
            commands.send(None)
        except Exception:
            commands.send(traceback.format_exc())
            return
