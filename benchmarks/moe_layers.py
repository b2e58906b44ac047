"""What bench_expert_mlp compares: layers of experts as users write them, after the routing."""

import torch
from torch.nn import functional as F

from m2ae_kernels.ops._moe_routing import MoERouting


def routing_of(ids, E):
    """What moe_sort returns, by a stable sort: all rivals get it, so nobody's is timed."""
    order = ids.flatten().argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).to(order))
    counts = torch.bincount(ids.flatten(), minlength=E)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    tensors = (order, inverse.view(ids.shape), offsets, counts)
    return MoERouting(*(tensor.to(torch.int32) for tensor in tensors))


def loop(x, w1, w2, weights, b1, b2, routing):
    """Sorted once, then a product per expert: parameters per expert, as in a ModuleList."""
    k, E = weights.shape[1], len(w1)
    sorted_ids, offsets = routing.sorted_ids.long(), routing.expert_offsets.tolist()
    tokens = sorted_ids // k
    flat = weights.flatten().to(x.dtype)  # index_add takes one dtype
    out = x.new_zeros(len(x), w2[0].shape[0])
    for e in range(E):
        begin, end = offsets[e], offsets[e + 1]
        if begin == end:
            continue
        rows = tokens[begin:end]
        y = F.linear(F.gelu(F.linear(x[rows], w1[e], b1[e])), w2[e], b2[e])
        out = out.index_add(0, rows, y * flat[sorted_ids[begin:end], None])
    return out


def expert_of_row(routing):
    """[N], of the rows in sorted order."""
    counts = routing.tokens_per_expert.long()
    experts = torch.arange(len(counts), device=counts.device)
    # The size, which the device would have to be asked for, and no compiler could know.
    return experts.repeat_interleave(counts, output_size=len(routing.sorted_ids))


def grouped_product(a, b, offs):
    return F.grouped_mm(a, b, offs=offs)


# Inductor takes torch's grouped_mm in bfloat16 alone: else it compiles what is between.
PRODUCTS = {True: grouped_product, False: torch.compiler.disable(grouped_product)}


def torch_grouped_mm(x, w1, w2, weights, b1, b2, routing):
    """Two grouped products of torch, with gather, bias and combine around them."""
    k = weights.shape[1]
    sorted_ids, offs = routing.sorted_ids.long(), routing.expert_offsets[1:]
    expert = expert_of_row(routing)
    product = PRODUCTS[x.dtype == torch.bfloat16]
    h = product(x[sorted_ids // k], w1.mT, offs) + b1[expert]
    y = product(F.gelu(h), w2.mT, offs) + b2[expert]
    of_slots = y[routing.inverse_ids.long().flatten()].view(*weights.shape, -1)
    return (of_slots * weights[..., None]).sum(1).to(x.dtype)


def all_experts(x, w1, w2, weights, b1, b2, routing):
    """Every expert on every token, then k of them: M3-JEPA's released form."""
    h = torch.einsum("td,ehd->teh", x, w1) + b1
    y = torch.einsum("teh,eoh->teo", F.gelu(h), w2) + b2
    k = weights.shape[1]
    ids = torch.empty_like(routing.sorted_ids)
    ids[routing.sorted_ids.long()] = expert_of_row(routing).to(ids.dtype)
    index = ids.view(-1, k, 1).long().expand(-1, -1, y.shape[2])
    return (y.gather(1, index) * weights[..., None]).sum(1).to(x.dtype)
