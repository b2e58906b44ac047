"""Pieces of plain PyTorch that several references are made of."""

import contextlib

import torch
from torch import Tensor


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 if one of `dtypes` is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast, if it is on for `device`, asks matrix products to run in."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A block whose dtypes are as written; autocast reaches into registered ops otherwise."""
    if device.type == "meta":  # has no autocast to turn off
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def sum_by_index(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """out[s] = sum of rows[i] over i with index[i] == s: [n, D] to [size, D].

    It is the backward of an embedding, which PyTorch sums in a fixed order on every device, unlike
    index_add_ and index_put_; and it is differentiable.
    """
    return torch.ops.aten.embedding_dense_backward(rows, index, size, -1, False)
