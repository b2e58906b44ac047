"""grouped_mm in Triton. Contract and math: m2ae_kernels/ops/grouped_mm.py

Two products are enough for the four forms and their gradients: of rows in groups with one matrix
each (_grouped_rows.py), and over the rows of each group (_grouped_depth.py). Columns in groups are
the rows of a transposed view, and two 3-D operands are groups of one height. Gradients of gathered
rows are summed by torch, in a fixed order.
"""

import torch
from torch import Tensor

from m2ae_kernels.ops._activations import IDENTITY, is_glu
from m2ae_kernels.ops._plain import sum_by_index, without_autocast
from m2ae_kernels.triton._device import on_device
from m2ae_kernels.triton._float64 import reference_for_float64
from m2ae_kernels.triton._grouped_depth import multiply_depth
from m2ae_kernels.triton._grouped_rows import Gather, multiply_rows
from m2ae_kernels.triton._grouped_sums import gradient_of_product
from m2ae_kernels.triton._grouped_tiles import contiguous_or_none


def _gather(a_ids: Tensor | None, rows: int) -> Gather | None:
    if a_ids is None:
        return None
    return Gather(a_ids.contiguous(), 1, max(rows, 1), of_slots=False)


@reference_for_float64
def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,  # [E]
    bias: Tensor | None,  # [E, C]
    a_ids: Tensor | None,  # [M]
    activation: int,
    out_dtype: torch.dtype,
    saves: bool,
) -> tuple[Tensor, Tensor]:
    """The product, and with `saves` what it was before the activation."""
    M, C = mat_a.shape[-2] if a_ids is None else len(a_ids), mat_b.shape[-1]
    shape = [M, C]
    if offs is None or mat_a.dim() == mat_b.dim() == 2:
        shape = [len(mat_a) if offs is None else len(offs), *shape]
    h = mat_a.new_empty(shape if saves else 0, dtype=out_dtype)
    shape[-1] = C // 2 if is_glu(activation) else C
    out = mat_a.new_empty(shape, dtype=out_dtype)
    offs = contiguous_or_none(offs)
    with on_device(mat_a):
        if mat_b.dim() == 3:
            multiply_rows(
                mat_a, mat_b, out, offs, bias=contiguous_or_none(bias), h=h if saves else None,
                gather=_gather(a_ids, mat_a.shape[0]), activation=activation,
                rounded=activation != IDENTITY,
            )  # fmt: skip
        elif mat_a.dim() == 3:
            multiply_rows(mat_b.mT, mat_a.mT, out.mT, offs, rounded=False)
        else:
            multiply_depth(mat_a.mT, mat_b, out, offs)
    return out, h


@reference_for_float64
def grouped_mm_backward(
    grad: Tensor,
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None,
    a_ids: Tensor | None,
    h: Tensor,  # of the shape of the product; empty without an activation
    activation: int,
    output_mask: list[bool],  # of mat_a, mat_b, bias
) -> tuple[Tensor, ...]:
    """Gradients of mat_a, mat_b and bias; empty where not asked for."""
    inputs = (mat_a, mat_b, bias)
    made = [
        mat_a.new_empty(t.shape) if need and t is not None else None
        for t, need in zip(inputs, output_mask, strict=True)
    ]
    by_a, by_b, by_bias = made
    offs = contiguous_or_none(offs)
    with on_device(mat_a), without_autocast(mat_a.device):
        if mat_b.dim() == 3:
            needs_g = by_a is not None or by_b is not None
            g = _by_product(grad, h, mat_a.dtype, offs, len(mat_b), activation, needs_g, by_bias)
            if by_a is not None and a_ids is None:
                multiply_rows(g, mat_b.mT, by_a, offs, rounded=False)
            elif by_a is not None and a_ids is not None:
                of_uses = g.new_empty(len(g), mat_a.shape[1], dtype=torch.float32)
                multiply_rows(g, mat_b.mT, of_uses, offs, rounded=False)
                made[0] = sum_by_index(of_uses, a_ids, len(mat_a)).to(mat_a.dtype)
            if by_b is not None:
                # Transposed, because it is the second operand that may be gathered.
                multiply_depth(g, mat_a, by_b.mT, offs, _gather(a_ids, len(mat_a)))
        elif mat_a.dim() == 3:
            g = grad.to(mat_a.dtype)
            if by_a is not None:
                multiply_depth(g.mT, mat_b.mT, by_a, offs)
            if by_b is not None:
                multiply_rows(g.mT, mat_a, by_b.mT, offs, rounded=False)
        else:
            g = grad.to(mat_a.dtype)
            if by_a is not None:
                multiply_rows(mat_b, g.mT, by_a.mT, offs, rounded=False)
            if by_b is not None:
                multiply_rows(mat_a.mT, g, by_b, offs, rounded=False)
    return tuple(mat_a.new_empty(0) if t is None else t for t in made)


def _by_product(
    grad: Tensor,  # [M, C] or [E, M, C]
    h: Tensor,
    dtype: torch.dtype,
    offs: Tensor | None,
    E: int,
    activation: int,
    needed: bool,
    by_bias: Tensor | None,
) -> Tensor:
    """The gradient by what was there before the activation, in `dtype`; writes by_bias."""
    if activation == IDENTITY:
        if by_bias is not None:
            gradient_of_product(grad, None, offs, E, activation, None, by_bias)
        return grad.to(dtype)
    g = torch.empty_like(h, dtype=dtype)
    gradient_of_product(grad, h, offs, E, activation, g if needed else None, by_bias)
    return g
