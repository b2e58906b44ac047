r"""grouped_mm: products of groups of rows with one matrix each, in one call.

Letters: E groups (experts), M rows, K depth, C columns. Group e is rows offs[e - 1] to offs[e],
from 0. Math, by the dimensions of the operands:

    2-D x 3-D  mat_a [M, K],    mat_b [E, K, C]  out [M, C]: rows e are act(A[rows e] B_e + bias_e)
    3-D x 2-D  mat_a [E, M, K], mat_b [K, C]     out [M, C]: columns e are A_e B[:, columns e]
    2-D x 2-D  mat_a [M, K],    mat_b [K, C]     out [E, M, C]: A[:, depth e] B[depth e]
    3-D x 3-D  mat_a [E, M, K], mat_b [E, K, C]  out [E, M, C]: act(A_e B_e + bias_e)

The backward of each consists of others: for the first, with g = dout act'(h), da_i = g_i B_e^T,
dB_e = A_e^T g_e over the rows of e, dbias_e = sum of g over the same rows.

Kernels: csrc/cpu/grouped_mm.cpp and grouped_mm_backward.cpp on the CPU, with products in float32
for every dtype; m2ae_kernels/triton/grouped_mm.py on CUDA. Elsewhere the reference serves,
sparsely: ops/_grouped_mm_reference.py.
Like torch.nn.functional.grouped_mm, of which it is a superset; Gale et al. 2022, "MegaBlocks".
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from m2ae_kernels.ops import _grouped_mm_reference
from m2ae_kernels.ops._activations import IDENTITY, activation_id
from m2ae_kernels.ops._checks import expect_dtype, refuse_forward_mode
from m2ae_kernels.ops._grouped_mm_arguments import check_epilogue, check_shapes, in_one_dtype
from m2ae_kernels.ops._grouped_mm_op import registered

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    a_ids: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.grouped_mm with bias, activation, gathered rows, and no limits.

    Args:
        mat_a: [M, K], rows sorted by group; or as the table at the top of this file has it.
            float32, bfloat16 or float16, any strides.
        mat_b: [E, K, C], or as in the table, in the dtype of `mat_a`, any strides.
        offs: [E] int32 or int64, where each group ends: not decreasing, at most the size of the
            axis that is in groups. None with two 3-D operands.
        bias: [E, C], with a 3-D `mat_b`; in the dtype of `mat_a`.
        activation: with a 3-D `mat_b`, a name of expert_mlp: "gelu", "gelu_tanh", "relu",
            "relu2", "silu", "identity"; or "swiglu", "geglu", "reglu", which take the columns in
            two halves, gate first, and return C / 2 of them. None is "identity".
        out_dtype: of the result; None is that of `mat_a`.
        a_ids: [M] int32 or int64, with mat_a [rows, K] and a 3-D `mat_b`: row i of the product is
            of mat_a[a_ids[i]]; of -1, a row of zeros.

    Returns:
        The product, contiguous. Rows (columns for 3-D x 2-D) at and beyond offs[-1] are zero, and
        what the operands hold there is not read. Differentiable once with respect to mat_a, mat_b
        and bias; gradients of an empty group, and of what is not read, are exactly 0.

    Precision: products and sums are float32 for every dtype, rounded to `out_dtype` once, and, if
    there is an activation, once more before it. On CUDA g is rounded to the dtype of `mat_a`, and
    float32 operands to tf32 where torch allows its own products that. Under autocast mat_a, mat_b
    and bias are rounded to the autocast dtype. For float64, see m2ae_kernels.reference.grouped_mm.

    Raises:
        ValueError: shapes do not fit, offs is missing or superfluous, an epilogue is asked for
            where there is none, or, on the CPU, offs decrease or an id is out of range.
        TypeError: a dtype or a device is not as above.
    """
    cure = "; m2ae_kernels.reference.grouped_mm takes float64"
    expect_dtype("grouped_mm", "mat_a", mat_a, FLOATING, cure)
    refuse_forward_mode("grouped_mm", mat_a, mat_b, bias)
    try:
        return _grouped_mm_of(registered, mat_a, mat_b, offs, bias, activation, out_dtype, a_ids)
    except RuntimeError as error:
        expected = re.search(r"grouped_mm: expected (offs|a_ids)[^\n]*", str(error))
        if expected is None:
            raise
        raise ValueError(expected[0]) from None  # what only the kernel looks at: values


def reference(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    a_ids: Tensor | None = None,
) -> Tensor:
    """What grouped_mm means, in plain PyTorch, differentiable; float64 computes in float64."""
    op = _grouped_mm_reference.forward
    return _grouped_mm_of(op, mat_a, mat_b, offs, bias, activation, out_dtype, a_ids)


def _grouped_mm_of(
    op: Callable[..., tuple[Tensor, ...]],
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype | None,
    a_ids: Tensor | None,
) -> Tensor:
    """Check the arguments and run `op`."""
    act = activation_id("grouped_mm", "activation", activation or "identity")
    mat_a, mat_b, bias = in_one_dtype(mat_a, mat_b, bias)
    out_dtype = mat_a.dtype if out_dtype is None else out_dtype
    check_shapes(mat_a, mat_b, offs)
    check_epilogue(mat_a, mat_b, bias, a_ids, act, out_dtype)
    offs = None if offs is None else offs.to(torch.int32)
    a_ids = None if a_ids is None else a_ids.to(torch.int32)
    needs_grad = (t is not None and t.requires_grad for t in (mat_a, mat_b, bias))
    saves = act != IDENTITY and torch.is_grad_enabled() and any(needs_grad)
    return op(mat_a, mat_b, offs, bias, a_ids, act, out_dtype, saves)[0]
