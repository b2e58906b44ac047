r"""info_nce_loss: the contrastive loss of N queries against M keys, both ways, nothing N x M saved.

Math. x_i and y_j are the rows of query and key (divided by max(|.|, eps) if normalize), s the
scale, l_ij = s x_i . y_j. Of the pairs of query i that are not absent, P_i are positive, k_i of
them (one, its target, unless pairs of one id are positive), and the others are negative. The
positives are kept out of the sums, so that what a nearly converged pair has left to lose is not
rounded away against a softmax of almost 1:

    R_i = sum of exp(l_ij) over the negatives      S_i = sum of exp(l_ij) over P_i
    loss_q[i] = mean over P_i of -log(exp(l_ij) / (R_i + S_i))
              = log1p(R_i / S_i) + log S_i - mean over P_i of l_ij        (k_i = 1: the log1p alone)

and loss_k[j] the same over the queries of key j, with C_j for R_i and T_j for S_i. With
w = d loss_q, v = d loss_k, the gradient of a logit is

    negative: w_i exp(l_ij) / (R_i + S_i) + v_j exp(l_ij) / (C_j + T_j)
    positive: w_i ((r - 1 / k_i) - r R_i / (R_i + S_i)) + v_j (the same),    r = exp(l_ij) / S_i

    dx = s dl y    dy = s dl^T x    ds = sum_i x_i . (dl y)_i

and through the division by |.|: (dx - x (x . dx)) / |.|. label_smoothing adds the mean positive
logit minus the mean logit, which are products with mean rows: no pass over the matrix.

The op: _info_nce_loss_op.py, its reference _info_nce_loss_reference.py. Kernels:
csrc/cpu/info_nce_loss.cpp, m2ae_kernels/triton/info_nce_loss.py.
Source: van den Oord et al. 2018, "Representation learning with contrastive predictive coding";
with both directions and a learned scale Radford et al. 2021, "CLIP"; several positives Khosla et
al. 2020, "Supervised contrastive learning".
"""

from typing import Any

import torch
from torch import Tensor

from m2ae_kernels.ops import _info_nce_loss_op, _info_nce_loss_reference
from m2ae_kernels.ops._checks import expect_dtype, refuse_forward_mode
from m2ae_kernels.ops._info_nce_loss_arguments import info_nce_loss_of

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    logit_bias: float | Tensor | None = None,
    target: Tensor | None = None,
    target_offset: int = 0,
    ignore_index: int = -100,
    symmetric: bool = True,
    normalize: bool = False,
    eps: float = 1e-12,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "negative",
    exclude_self: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    return_metrics: bool = False,
    allow_tf32: bool | None = None,
    max_workspace_bytes: int | None = None,
) -> Any:
    """Cross entropy of each query's positive among all keys, and of each key's among all queries.

    Args:
        query: anchors, [N, D]; float32, bfloat16 or float16.
        key: candidates, [M, D], in the dtype of `query`. Keys that are nobody's positive are
            further negatives.
        logit_scale: factor on the similarities, already exponentiated: a number, or a tensor of
            one element on the device of `query`, which is read there and gets its gradient.
        logit_bias: a number, or a tensor of one element. It cancels: the loss does not depend on
            it, and its gradient is 0.
        target: key of each query's positive, [N] int64 in [0, M), or `ignore_index`. Several
            queries may share a key. None is arange(N) + target_offset.
        target_offset: without a target, the key of the first query's positive.
        ignore_index: a query with this target has no loss, but is a negative for the keys.
        symmetric: True is (query to key + key to query) / 2, False is query to key alone.
        normalize: divide each row by its norm first.
        eps: smallest norm to divide by, > 0; as in torch.nn.functional.normalize.
        query_mask: [N] bool; a row with False is absent: neither anchor nor negative. It may hold
            NaN, and its gradient is 0.
        key_mask: [M] bool; the same for keys. A query whose positives are absent has no loss.
        query_ids: group of each query, [N] int64; needs key_ids.
        key_ids: group of each key, [M] int64.
        same_id: what a query and a key of one group are, where the key is not the target anyway:
            "negative", like any other; "ignore", left out of both sums; "positive", too, each of
            k positives weighing 1/k.
        exclude_self: query and key are one set: leave out the pairs (i, i + target_offset), even
            where that is the target.
        label_smoothing: share of the target that is spread evenly over what is not left out, in
            [0, 1); as in torch.nn.functional.cross_entropy.
        weight: factor on each query's losses, [N], any floating dtype. That of a key is the mean
            over the queries it is a positive of.
        reduction: "mean" over the queries that are in the loss, and over the keys that are, by
            weight; "sum"; or "none".
        return_metrics: also return ranks and logits of the same pass.
        allow_tf32: products of float32 on a GPU may round to tf32; None follows
            torch.backends.cuda.matmul. The CPU computes in float32.
        max_workspace_bytes: bound on temporaries that grow with N x M, in bytes >= 0; one tile
            always fits. None is 512 MiB. On the CPU the logits of one call are kept for its
            backward while they take no more than this and 64 MiB.

    Returns:
        The loss, a float32 scalar; 0 if there is no pair. With reduction="none" the pair
        (loss_q [N], loss_k [M]), where a row without a positive has loss 0; loss_k is None without
        symmetric. Differentiable once with respect to query, key, logit_scale and weight.
        With return_metrics (loss, ContrastiveMetrics).

    A single pair has loss 0 exactly. A key that is the target of k > 1 queries weighs each of them
    by 1/k. A row that holds NaN, and is present, spreads it as in PyTorch. A row of norm 0 stays 0
    under normalize, and its gradient is divided by eps. Results repeat bit for bit on one device
    and number of threads.

    Precision: dot products, sums and the loss are float32 for every dtype, with log1p, so that a
    loss of 1e-20 still has its leading digits; gradients are rounded to the dtype of their input.
    Under autocast query and key are rounded to the autocast dtype, the scale is not.

    Raises:
        ValueError: a shape does not fit; on the CPU, an element of `target` is out of range (on a
            GPU such a query has no loss); a value is not as above; ids without the other side's.
        TypeError: a dtype or a device is not as above.
    """
    for name, features in {"query": query, "key": key}.items():
        cure = "; m2ae_kernels.reference.info_nce_loss takes float64"
        expect_dtype("info_nce_loss", name, features, FLOATING, cure)
    refuse_forward_mode("info_nce_loss", query, key, logit_scale)
    pairs = (target, target_offset, ignore_index, symmetric, normalize, eps)
    rows = (query_mask, key_mask, query_ids, key_ids, same_id, exclude_self)
    reduced = (label_smoothing, weight, reduction, return_metrics, allow_tf32, max_workspace_bytes)
    given = (logit_scale, logit_bias, *pairs, *rows, *reduced)
    return info_nce_loss_of(_info_nce_loss_op.call, query, key, *given)


def reference(
    query: Tensor,
    key: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    logit_bias: float | Tensor | None = None,
    target: Tensor | None = None,
    target_offset: int = 0,
    ignore_index: int = -100,
    symmetric: bool = True,
    normalize: bool = False,
    eps: float = 1e-12,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "negative",
    exclude_self: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    return_metrics: bool = False,
    allow_tf32: bool | None = None,
    max_workspace_bytes: int | None = None,
) -> Any:
    """What info_nce_loss means, in plain PyTorch, differentiable; float64 computes in float64."""
    pairs = (target, target_offset, ignore_index, symmetric, normalize, eps)
    rows = (query_mask, key_mask, query_ids, key_ids, same_id, exclude_self)
    reduced = (label_smoothing, weight, reduction, return_metrics, allow_tf32, max_workspace_bytes)
    given = (logit_scale, logit_bias, *pairs, *rows, *reduced)
    return info_nce_loss_of(_info_nce_loss_reference.forward, query, key, *given)
