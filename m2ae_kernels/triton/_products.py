"""Matrix products by torch (cuBLAS on a GPU) that accumulate and return float32."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def precision_of_products(x: Tensor, allow_tf32: bool) -> Iterator[None]:
    """A block in which products of float32 round to tf32 or not, and autocast rounds nothing.

    The setting is the process's, so it is touched only where it differs, and put back.
    """
    matmul = torch.backends.cuda.matmul
    with torch.autocast(x.device.type, enabled=False):
        before = matmul.fp32_precision
        if not x.is_cuda or x.dtype != torch.float32 or (before == "tf32") == allow_tf32:
            yield
            return
        matmul.fp32_precision = "tf32" if allow_tf32 else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32."""
    if not a.is_cuda:  # the kernels are interpreted; out_dtype is for CUDA
        return (a.double() @ b.double()).float()
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`total + a @ b` in float32; in place, if there is a total."""
    if total is None:
        return product(a, b)
    if not a.is_cuda:
        return total.add_(product(a, b))
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
