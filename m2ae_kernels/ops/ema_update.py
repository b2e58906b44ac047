r"""ema_update_: move every target tensor towards its source, in one pass over memory.

Math, per element, for decay d (the weight of the old target) and w = 1 - d:

    target <- target + w (source - target)         if w < 1/2
    target <- source - d (source - target)         otherwise

which is torch.lerp's formula with its two branches and its fused multiply-add, so equal dtypes give
the bits of `torch._foreach_lerp_(targets, sources, 1 - d)`. d = 0 is an exact copy and d = 1 leaves
the target alone, whatever the other side holds; torch would spread a NaN there. No gradient.

Kernels: csrc/cpu/ema_update.cpp on the CPU, csrc/cuda/ema_update.cu on CUDA.
Used by: Tarvainen & Valpola 2017, "Mean teachers are better role models"; Grill et al. 2020,
"Bootstrap your own latent"; Assran et al. 2023, "I-JEPA", for the target encoder.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from m2ae_kernels._library import define

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)
SHADOWS = (torch.bfloat16, torch.float16)


def ema_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    decay: float | Tensor,
    *,
    shadows: Sequence[Tensor] | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Exponential moving average, in place: `targets` move towards `sources`.

    Args:
        targets: list of tensors on one device, updated in place; float32, float64, bfloat16 or
            float16, and complex64 or complex128 (averaged as pairs of reals). Integer and bool
            tensors have no average: they are copied from their source, bit for bit, at any decay.
        sources: list of as many tensors, each of its target's shape, in any of the floating dtypes
            (complex for complex, the same dtype for integers and bool).
        decay: weight of the old target, in [0, 1]. A 0-d float64 tensor is read where the targets
            are, without a host sync, so a captured CUDA graph follows its changes; a CPU tensor
            serves any targets. float32 is accepted, but 1 - 0.99999 is then off by 0.1 %.
        shadows: list of as many tensors, bfloat16 or float16 (for integer targets: of the
            target's dtype), which receive a copy of the new targets in the same pass.
        found_inf: one number, float32 or bool, on the targets' device; where it is not zero,
            nothing is changed (as torch.amp.GradScaler skips a step).

    Returns:
        None. Version counters of targets and shadows are bumped, so autograd notices.

    Arithmetic is in float32, or float64 if the target or the source is. Any strides; a target that
    is no dense run of memory in its source's order takes a slower path. A tensor that occurs
    several times with one source (tied parameters) is updated once.

    Raises:
        ValueError: lengths or shapes differ; decay is outside [0, 1] or NaN; targets or shadows
            overlap in memory, or expand one element to several; over 8 dimensions that do not
            merge; tensors that a graph capture meets for the first time.
        TypeError: a dtype or a device is not as above.
    """
    number, tensor = (0.0, decay) if isinstance(decay, Tensor) else (decay, None)
    try:
        _op(targets, sources, number, tensor, shadows, found_inf)
    except RuntimeError as error:
        _check(targets, sources, tensor, shadows, found_inf)
        _check_range(number, tensor)
        expected = re.search("ema_update_: expected.*", str(error))
        if expected is None:
            raise
        raise ValueError(expected[0]) from None  # what only the kernels look at: memory
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(targets)
        if shadows is not None:
            torch.autograd.graph.increment_version(shadows)


def _check(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    decay_tensor: Tensor | None,
    shadows: Sequence[Tensor] | None,
    found_inf: Tensor | None,
) -> None:
    """Say what is wrong. Compiled kernels refuse on their own, so it costs only those who err."""
    lists = {"targets": targets, "sources": sources}
    if shadows is not None:
        lists["shadows"] = shadows
    for name, tensors in lists.items():
        if not isinstance(tensors, list | tuple) or not all(isinstance(x, Tensor) for x in tensors):
            kind = type(tensors).__name__
            raise TypeError(f"ema_update_: expected {name} to be a list of tensors, got {kind}")
        if len(tensors) != len(targets):
            raise ValueError(
                f"ema_update_: expected {len(targets)} {name}, one per target, got {len(tensors)}"
            )
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        shadow = None if shadows is None else shadows[i]
        _check_pair(i, targets[0].device, target, source, shadow)
    device = targets[0].device if targets else torch.device("cpu")
    if decay_tensor is not None:
        _check_number("decay", decay_tensor, (torch.float64, torch.float32), device)
    if found_inf is not None:
        _check_number("found_inf", found_inf, (torch.float32, torch.bool), device)


def _check_range(decay: float, decay_tensor: Tensor | None) -> None:
    if decay_tensor is not None and decay_tensor.device.type == "cpu":
        decay = decay_tensor.item()
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"ema_update_: expected decay in [0, 1], got {decay}")


def _check_number(
    name: str, number: Tensor, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    if number.numel() != 1:
        raise ValueError(
            f"ema_update_: expected one number as {name}, got shape {list(number.shape)}"
        )
    if number.dtype not in dtypes:
        raise TypeError(f"ema_update_: expected {name} in {_names(dtypes)}, got {number.dtype}")
    if number.device != device and not (name == "decay" and number.device.type == "cpu"):
        raise TypeError(
            f"ema_update_: expected {name} on the targets' device {device}, got {number.device}"
        )


def _check_pair(
    i: int, device: torch.device, target: Tensor, source: Tensor, shadow: Tensor | None
) -> None:
    of_pair = {"target": target, "source": source}
    if shadow is not None:
        of_pair["shadow"] = shadow
    for name, tensor in of_pair.items():
        if tensor.shape != target.shape:
            raise ValueError(
                f"ema_update_: expected {name} {i} of its target's shape {list(target.shape)},"
                f" got {list(tensor.shape)}"
            )
        if tensor.device != device:
            raise TypeError(
                f"ema_update_: expected all tensors on {device}, got {name} {i} on {tensor.device}"
            )
        if name != "source" and any(
            stride == 0 and size > 1
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise ValueError(
                f"ema_update_: expected {name} {i} without expanded dimensions, got strides"
                f" {list(tensor.stride())} for shape {list(tensor.shape)}"
            )
    kinds = next((kinds for kinds in (FLOATING, COMPLEX) if target.dtype in kinds), (target.dtype,))
    if source.dtype not in kinds:
        raise TypeError(
            f"ema_update_: expected source {i} in one of {_names(kinds)} for a {target.dtype}"
            f" target, got {source.dtype}"
        )
    kinds = SHADOWS if target.dtype in FLOATING else (target.dtype,)
    if shadow is not None and (shadow.dtype not in kinds or target.dtype in COMPLEX):
        raise TypeError(
            f"ema_update_: expected shadow {i} in one of {_names(kinds)} for a {target.dtype}"
            f" target, got {shadow.dtype}"
        )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def reference(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    decay: float | Tensor,
    *,
    shadows: Sequence[Tensor] | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """What ema_update_ means, in plain PyTorch, one tensor after the other; on any device."""
    number, tensor = (0.0, decay) if isinstance(decay, Tensor) else (decay, None)
    _reference(targets, sources, number, tensor, shadows, found_inf)


@torch.no_grad()
def _reference(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    decay: float,
    decay_tensor: Tensor | None = None,
    shadows: Sequence[Tensor] | None = None,
    found_inf: Tensor | None = None,
) -> None:
    _check(targets, sources, decay_tensor, shadows, found_inf)
    _check_range(decay, decay_tensor)
    if decay_tensor is None:
        decay_tensor = torch.scalar_tensor(decay, dtype=torch.float64)
    done: set[tuple[int, int, tuple[int, ...]]] = set()
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        memory = (target.data_ptr(), target.numel(), target.stride())
        if memory in done:  # tied
            continue
        done.add(memory)
        new = _average(target, source, decay_tensor.reshape(()).to(target.device))
        if found_inf is not None:
            new = torch.where(found_inf.reshape(()) != 0, target, new)
        target.copy_(new)
        if shadows is not None:
            skip = torch.zeros((), dtype=torch.bool) if found_inf is None else found_inf != 0
            skip = skip.reshape(()).to(target.device)
            shadows[i].copy_(torch.where(skip, shadows[i], target.to(shadows[i].dtype)))


def _average(target: Tensor, source: Tensor, decay: Tensor) -> Tensor:
    if target.is_complex():
        return torch.view_as_complex(
            _average(torch.view_as_real(target), torch.view_as_real(source), decay)
        )
    if not target.is_floating_point():
        return source
    acc = torch.float64 if torch.float64 in (target.dtype, source.dtype) else torch.float32
    weight = (1 - decay.double()).to(acc)
    new = torch.lerp(target.to(acc), source.to(acc), weight).to(target.dtype)
    new = torch.where(decay == 0, source.to(target.dtype), new)
    return torch.where(decay == 1, target, new)


def _fake(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    decay: float,
    decay_tensor: Tensor | None = None,
    shadows: Sequence[Tensor] | None = None,
    found_inf: Tensor | None = None,
) -> None:
    _check(targets, sources, decay_tensor, shadows, found_inf)


define(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float decay, Tensor? decay_tensor=None,"
    " Tensor(b!)[]? shadows=None, Tensor? found_inf=None) -> ()",
    reference=_reference,
    fake=_fake,
)
# An optimizer step has no gradient: without this, every call would pass through a warning hook.
torch.library.impl("m2ae_kernels::ema_update_", "Autograd", torch.library.fallthrough_kernel)
_op = torch.ops.m2ae_kernels.ema_update_.default
