"""grouped_mm in plain PyTorch, forward and backward. Math and letters: grouped_mm.py

Groups go through batched products in blocks (_moe_blocks.py): nothing waits for the values of
`offs`, at up to twice the arithmetic of the rows themselves, with a copy of the matrices of up to
2 E groups, in float32 for every dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from m2ae_kernels.ops._activations import activate, activate_backward
from m2ae_kernels.ops._moe_blocks import RowBlocks, of_experts, row_blocks, sum_by_expert, take
from m2ae_kernels.ops._plain import accumulator, sum_by_index, without_autocast


def _blocks(offs: Tensor, M: int) -> RowBlocks:
    return row_blocks(F.pad(offs, (1, 0)), M)


def _by_row(of_entries: Tensor, blocks: RowBlocks) -> Tensor:
    """[B, n, C] to [M, C]; zeros for rows of no group."""
    return take(of_entries.flatten(0, 1), blocks.place)


def _rows_product(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """[M, K] times the [K, C] of each row's group: [M, C]."""
    blocks = _blocks(offs, len(a))
    return _by_row(take(a, blocks.rows) @ of_experts(b, blocks), blocks)


def _depth_product(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """[M, K] times [K, C], K in groups: [E, M, C]."""
    blocks = _blocks(offs, len(b))
    products = take(a.mT, blocks.rows).mT @ take(b, blocks.rows)
    return sum_by_expert(products, blocks, len(offs))


def _gathered(a: Tensor, a_ids: Tensor | None) -> Tensor:
    return a if a_ids is None else take(a, torch.where(a_ids < 0, len(a), a_ids).long())


def forward(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,  # [E]
    bias: Tensor | None,  # [E, C]
    a_ids: Tensor | None,  # [M]
    activation: int,
    out_dtype: torch.dtype,
    saves: bool,
) -> tuple[Tensor, Tensor]:
    acc = accumulator(mat_a.dtype, out_dtype)
    with without_autocast(mat_a.device):
        a, b = mat_a.to(acc), mat_b.to(acc)
        if offs is None:
            product = a @ b  # [E, M, C]
            product = product if bias is None else product + bias.to(acc)[:, None, :]
        elif mat_b.dim() == 3:
            blocks = _blocks(offs, len(mat_a) if a_ids is None else len(a_ids))
            rows = take(_gathered(a, a_ids), blocks.rows)
            product = rows @ of_experts(b, blocks)
            if bias is not None:
                product = product + of_experts(bias.to(acc), blocks)[:, None, :]
        elif mat_a.dim() == 3:
            product = _rows_product(b.mT, a.mT, offs).mT.contiguous()
        else:
            product = _depth_product(a, b, offs)
        h = product.to(out_dtype)
        out = activate(h.to(acc), activation).to(out_dtype)
        if offs is not None and mat_b.dim() == 3:
            out, h = _by_row(out, blocks), _by_row(h, blocks) if saves else h
        return out, h if saves else out.new_empty(0)


def backward(
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
    acc = accumulator(mat_a.dtype, grad.dtype)
    with without_autocast(mat_a.device):
        a, b, g = mat_a.to(acc), mat_b.to(acc), grad.to(acc)
        if h.numel() > 0:
            g = activate_backward(g, h.to(acc), activation)
        by_bias = g.new_empty(0)
        if offs is None:
            by_a, by_b, by_bias = g @ b.mT, a.mT @ g, g.sum(1)
        elif mat_b.dim() == 3:
            by_a = _rows_product(g, b.mT, offs)
            if a_ids is not None:
                by_a = sum_by_index(by_a, a_ids, len(a))
            by_b = _depth_product(_gathered(a, a_ids).mT, g, offs)
            blocks = _blocks(offs, len(g))
            by_bias = sum_by_expert(take(g, blocks.rows).sum(1), blocks, len(offs))
        elif mat_a.dim() == 3:
            by_a = _depth_product(g, b.mT, offs)
            by_b = _rows_product(g.mT, a, offs).mT
        else:
            by_a = _rows_product(b, g.mT, offs).mT
            by_b = _rows_product(a.mT, g, offs)
    made = zip((by_a, by_b, by_bias), (mat_a, mat_b, bias), output_mask, strict=True)
    return tuple(
        value.to(tensor.dtype).contiguous()
        if need and tensor is not None
        else grad.new_empty(0, dtype=mat_a.dtype)
        for value, tensor, need in made
    )
