"""Arguments that the contrastive losses share: features, numbers, options."""

import torch
from torch import Tensor

from m2ae_kernels.ops._checks import expect_device, expect_dtype
from m2ae_kernels.ops._plain import autocast_dtype

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WORKSPACE = 512 << 20  # bytes, if max_workspace_bytes is None


def features(
    op: str, query: Tensor, key: Tensor, names: tuple[str, str] = ("query", "key")
) -> tuple[Tensor, Tensor]:
    """The two sides in the dtype to compute in, which autocast may ask for."""
    first, second = names
    if query.dim() != 2:
        raise ValueError(f"{op}: expected {first} [N, D], got {list(query.shape)}")
    if key.dim() != 2 or key.shape[1] != query.shape[1]:
        raise ValueError(
            f"{op}: expected {second} [M, D = {query.shape[1]}], got {list(key.shape)}"
        )
    expect_dtype(op, first, query, FLOATING)
    expect_dtype(op, second, key, FLOATING)
    expect_device(op, second, key, first, query.device)
    asked = autocast_dtype(query.device)
    if asked is not None and torch.float64 not in (query.dtype, key.dtype):
        query, key = query.to(asked), key.to(asked)
    if query.dtype != key.dtype:
        raise TypeError(
            f"{op}: expected {second} in the dtype of {first}, {query.dtype}, got {key.dtype}"
        )
    return query, key


def check_options(op: str, eps: float, reduction: str, max_workspace_bytes: int | None) -> None:
    """Values that both contrastive losses refuse."""
    if not eps > 0:
        raise ValueError(f"{op}: expected eps > 0, got {eps}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{op}: expected reduction "mean", "sum" or "none", got {reduction!r}')
    if max_workspace_bytes is not None and max_workspace_bytes < 0:
        raise ValueError(f"{op}: expected max_workspace_bytes >= 0, got {max_workspace_bytes}")


def use_tf32(query: Tensor, allow_tf32: bool | None) -> bool:
    """Whether products of float32 may round to tf32: as asked for, else as matrix products do."""
    if query.device.type != "cuda" or query.dtype != torch.float32:
        return False
    if allow_tf32 is not None:
        return allow_tf32
    # Unlike matmul.allow_tf32, this may be read whichever way the setting was made.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def number(
    op: str, name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:  # []
    """A number, or a tensor of one element, as a 0-d tensor on the device."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    if value.numel() != 1:
        raise ValueError(f"{op}: expected one number as {name}, got shape {list(value.shape)}")
    expect_dtype(op, name, value, FLOATING)
    expect_device(op, name, value, "the features", device)
    return value.reshape(())
