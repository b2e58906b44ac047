"""What grouped_mm accepts."""

import torch
from torch import Tensor

from m2ae_kernels.ops._activations import IDENTITY, is_glu
from m2ae_kernels.ops._checks import expect_device, expect_dtype
from m2ae_kernels.ops._plain import autocast_dtype

_OP = "grouped_mm"
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)


def in_one_dtype(
    mat_a: Tensor, mat_b: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in the dtype to compute in, which autocast may ask for; on one device."""
    for name, tensor in {"mat_a": mat_a, "mat_b": mat_b, "bias": bias}.items():
        expect_device(_OP, name, tensor, "mat_a", mat_a.device)
        if tensor is not None:
            expect_dtype(_OP, name, tensor, FLOATING)
    asked = autocast_dtype(mat_a.device)
    if asked is not None and mat_a.dtype != torch.float64:
        return mat_a.to(asked), mat_b.to(asked), None if bias is None else bias.to(asked)
    for name, tensor in {"mat_b": mat_b, "bias": bias}.items():
        if tensor is not None and tensor.dtype != mat_a.dtype:
            raise TypeError(
                f"{_OP}: expected {name} in the dtype of mat_a, {mat_a.dtype}, got {tensor.dtype}"
            )
    return mat_a, mat_b, bias


def check_shapes(mat_a: Tensor, mat_b: Tensor, offs: Tensor | None) -> None:
    """The matrices and the groups fit together."""
    dims = (mat_a.dim(), mat_b.dim())
    if not set(dims) <= {2, 3}:
        raise ValueError(
            f"{_OP}: expected mat_a and mat_b 2-D or 3-D, got {list(mat_a.shape)} and"
            f" {list(mat_b.shape)}"
        )
    if mat_a.shape[-1] != mat_b.shape[-2]:
        raise ValueError(
            f"{_OP}: expected mat_b [..., K = {mat_a.shape[-1]}, C], got {list(mat_b.shape)}"
        )
    if dims == (3, 3):
        if offs is not None:
            raise ValueError(f"{_OP}: expected no offs with 3-D mat_a and mat_b, got offs")
        if len(mat_a) != len(mat_b):
            raise ValueError(
                f"{_OP}: expected mat_b [E = {len(mat_a)}, K, C], got {list(mat_b.shape)}"
            )
        return
    if offs is None:
        raise ValueError(f"{_OP}: expected offs with a 2-D mat_a or mat_b, got none")
    expect_dtype(_OP, "offs", offs, INDICES)
    expect_device(_OP, "offs", offs, "mat_a", mat_a.device)
    E = len(mat_a) if dims == (3, 2) else len(mat_b) if dims == (2, 3) else None
    if offs.dim() != 1 or len(offs) < 1 or E not in (None, len(offs)):
        wanted = "E" if E is None else f"E = {E}"
        raise ValueError(f"{_OP}: expected offs [{wanted}], E >= 1, got {list(offs.shape)}")


def check_epilogue(
    mat_a: Tensor,
    mat_b: Tensor,
    bias: Tensor | None,
    a_ids: Tensor | None,
    activation: int,
    out_dtype: torch.dtype,
) -> None:
    """What comes on top of the product, and where it may."""
    dims = (mat_a.dim(), mat_b.dim())
    if a_ids is not None:
        if dims != (2, 3):
            raise ValueError(f"{_OP}: expected a_ids with mat_a [M, K] and mat_b [E, K, C] only")
        if a_ids.dim() != 1:
            raise ValueError(f"{_OP}: expected a_ids [M], got {list(a_ids.shape)}")
        expect_dtype(_OP, "a_ids", a_ids, INDICES)
        expect_device(_OP, "a_ids", a_ids, "mat_a", mat_a.device)
    if dims[1] != 3 and (bias is not None or activation != IDENTITY):
        raise ValueError(f"{_OP}: expected bias and activation with mat_b [E, K, C] only")
    if bias is not None and bias.shape != (len(mat_b), mat_b.shape[2]):
        raise ValueError(
            f"{_OP}: expected bias [E = {len(mat_b)}, C = {mat_b.shape[2]}], got {list(bias.shape)}"
        )
    if is_glu(activation) and mat_b.shape[2] % 2 != 0:
        raise ValueError(
            f"{_OP}: expected an even C for a gated activation, got mat_b {list(mat_b.shape)}"
        )
    if out_dtype not in FLOATING:
        raise TypeError(f"{_OP}: expected a floating out_dtype, got {out_dtype}")
