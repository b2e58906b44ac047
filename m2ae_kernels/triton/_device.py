"""The device that kernels are launched for."""

import contextlib

import torch
from torch import Tensor


def on_device(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """A block whose kernels run where x is."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def capability(x: Tensor) -> tuple[int, int]:
    """Major compute capability, 0 for CPU tensors, which are interpreted; multiprocessors."""
    if not x.is_cuda:
        return 0, 3
    properties = torch.cuda.get_device_properties(x.device)  # cached by torch
    return properties.major, properties.multi_processor_count


def is_interpreted(x: Tensor) -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return capability(x)[0] == 0


def allows_tf32(x: Tensor) -> bool:
    """Whether torch lets products of float32 round to tf32 where x is."""
    # Unlike matmul.allow_tf32, this may be read whichever way the setting was made.
    return x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
