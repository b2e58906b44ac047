"""Gradients that cannot be differentiated again, and say so instead of counting as constants."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def differentiable_once(op: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Of a torch.autograd.Function's backward, which has to have saved the inputs.

    PyTorch's own once_differentiable lets a second derivative pass that depends on the gradients
    alone, as that of a gradient penalty.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        def once(ctx: Any, grad: Tensor) -> Gradients:
            with torch.no_grad():
                grads = backward(ctx, grad)
            if not torch.is_grad_enabled():
                return grads
            inputs = [saved for saved in ctx.saved_tensors if saved is not None]
            made = [of for of in grads if of is not None]
            function: Any = _Refusal
            refusing = iter(function.apply(op, len(made), *made, grad, *inputs))
            return tuple(None if of is None else next(refusing) for of in grads)

        return once

    return decorate


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(of.view_as(of) for of in tensors[:number])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(
            f"{ctx.op}: expected one backward, got a second derivative;"
            f" m2ae_kernels.reference.{ctx.op} has it"
        )
