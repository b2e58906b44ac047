"""Refusals that several ops share, so that they read alike."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def expect_default(op: str, name: str, value: object, default: object = None) -> None:
    """Refuse an argument that is part of the signature, but not of the implementation."""
    if isinstance(value, Tensor):
        raise NotImplementedError(f"{op}: {name}=Tensor{list(value.shape)} is not supported yet")
    if value != default:
        raise NotImplementedError(f"{op}: {name}={value!r} is not supported yet")


def expect_device(
    op: str, name: str, tensor: Tensor | None, first: str, device: torch.device
) -> None:
    """All tensors of a call are on the device of its `first` argument."""
    if tensor is not None and tensor.device != device:
        raise TypeError(
            f"{op}: expected {name} on the device of {first}, {device}, got {tensor.device}"
        )


def expect_dtype(
    op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], cure: str = ""
) -> None:
    """`tensor` is in one of `dtypes`."""
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: expected {name} in {allowed}, got {tensor.dtype}{cure}")


def refuse_forward_mode(op: str, *differentiable: object) -> None:
    """No input has a tangent: PyTorch would go on with zeros in the place of the derivative."""
    if torch.compiler.is_compiling():
        return  # tracers know no tangents
    for tensor in differentiable:
        if isinstance(tensor, Tensor) and unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{op}: expected reverse mode, got a tangent of forward mode;"
                f" m2ae_kernels.reference.{op} has both"
            )


def refuse_second_derivative(op: str) -> None:
    """Let a backward through `<op>_backward` raise; PyTorch would go on without its gradient."""

    def refuse(*_: Any) -> NoReturn:
        raise RuntimeError(
            f"{op}: expected one backward, got a second derivative;"
            f" m2ae_kernels.reference.{op} has it"
        )

    torch.library.register_autograd(f"m2ae_kernels::{op}_backward", refuse)
