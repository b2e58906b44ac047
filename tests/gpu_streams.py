"""Work on a GPU as a graph, and on a stream of its own: what tests of several ops need."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of one `step`, and the step's outputs, which every replay writes anew."""
    with own_stream():  # what a first call allocates and compiles is not captured
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


@contextlib.contextmanager
def own_stream(*, busy: bool = False) -> Iterator[None]:
    """Another stream than the current one, which waits for it; `busy`: behind work of 10 ms."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if busy:
            torch.cuda._sleep(20_000_000)  # cycles
        yield
    torch.cuda.current_stream().wait_stream(stream)
