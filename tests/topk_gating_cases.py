"""What the tests of topk_gating share: its definition in float64, and how outputs are compared."""

import math

import torch
from torch.testing import assert_close

from m2ae_kernels import TopkGatingOutput

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCORES = ["softmax", "sigmoid", "sqrtsoftplus"]
ALL = {"return_entropy": True, "return_probs_sum": True}


def scores_of(z, score_function):
    """[R, E] as in the papers, not by logarithms."""
    if score_function == "softmax":
        return z.softmax(-1)
    if score_function == "sigmoid":
        return 1 / (1 + (-z).exp())
    return torch.log1p(z.exp()).sqrt()


def stable_order(values):
    """Descending, the lowest index first; the values that are -inf, then those that are NaN."""
    return values.neg().sort(dim=-1, stable=True).indices  # torch sorts NaN after +inf


def chosen(selection, k, n_group, topk_group, best):
    """The k best of the best groups, one row after the other."""
    ids = []
    for row in selection.detach():
        size = len(row) // n_group
        groups = row.view(n_group, size)
        of_group = torch.stack([g[stable_order(g)][:best].sum() for g in groups])
        kept = stable_order(of_group)[:topk_group].tolist()
        order = [e for e in stable_order(row).tolist() if e // size in kept]
        ids.append(order[:k])
    return torch.tensor(ids, dtype=torch.int64).view(-1, k)


def exact(
    logits,
    k,
    *,
    score="softmax",
    norm=False,
    factor=1.0,
    bias=None,
    groups=(1, 1, 1),
    shift=None,
):
    """topk_gating of finite logits [T, E], unmasked, in float64; differentiable."""
    z = logits.double()
    if shift is not None:
        z = (z[None] + shift.double()[:, None]).flatten(0, 1)
    scores = scores_of(z, score)
    p = scores / scores.sum(-1, keepdim=True)
    selection = z if bias is None else scores + bias.double()
    if groups[0] == 1:
        order = stable_order(selection.detach())[:, :k]
    else:
        by = scores if bias is None and groups[2] > 1 else selection
        order = chosen(by, k, *groups).to(z.device)
    weights = scores.gather(1, order)
    if norm:
        weights = weights / weights.sum(-1, keepdim=True)
    entropy = torch.special.entr(p).sum(-1)
    count = torch.bincount(order.flatten(), minlength=z.shape[1])
    logsumexp = z.logsumexp(-1) if score == "softmax" else torch.zeros_like(entropy)
    return TopkGatingOutput(weights * factor, order, logsumexp, entropy, p.sum(0), count)


def differentiable(output):
    return [output.topk_weights, output.logsumexp, output.entropy, output.probs_sum]


def assert_outputs(actual, expected, rtol=None):
    """Integers exactly, numbers at the default tolerance of float32, or within `rtol`."""
    assert_close(actual.topk_ids, expected.topk_ids.int())
    assert_close(actual.tokens_per_expert, expected.tokens_per_expert.int())
    bounds = {} if rtol is None else {"rtol": rtol, "atol": 0}
    for x, y in zip(differentiable(actual), differentiable(expected), strict=True):
        assert x.dtype == torch.float32
        assert_close(x, y.float(), **bounds)


def gradients(output, upstream, inputs):
    """Of the outputs that have one, weighed by `upstream`."""
    pairs = zip(differentiable(output), upstream, strict=True)
    pairs = [(x, g.to(x.dtype)) for x, g in pairs if x.requires_grad]
    outputs, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, weights, retain_graph=True)


def separated(rows, E, device="cpu"):
    """Logits [rows, E] all different within a row, multiples of 1/8 around 0: sums are exact."""
    order = torch.rand(rows, E, device=device).argsort(1)
    return (order - E // 2) / 8


def ids_of(device, *rows):
    return torch.tensor(rows, dtype=torch.int32, device=device)


INF, NAN = math.inf, math.nan
