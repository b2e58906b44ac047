"""float64 has no Triton kernels: the reference serves it."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from m2ae_kernels._library import REFERENCES


def reference_for_float64(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of the op of its name; or, for float64, that op's reference."""

    @functools.wraps(kernel)
    def serve(*args: Any) -> Any:
        if args[0].dtype == torch.float64:
            return REFERENCES[kernel.__name__](*args)
        return kernel(*args)

    return serve
