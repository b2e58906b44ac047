"""info_nce_loss over the rows of all ranks: local rows times all columns, computed once.

A rank has the whole rows of its queries, and of each column its part. Of the columns' sums, O(N)
numbers, the ranks make those of the whole column; with these the backward op yields exact
gradients: the query's whole, the key's a part per rank, which are summed where the key is at home.

Source: Gao et al. 2022, "DisCo-CLIP" (each rank its rows); Cheng et al. 2024, "Breaking the memory
barrier" (keys that travel around a ring).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m2ae_kernels.distributed._info_nce_loss_parts import Options, Queries
from m2ae_kernels.distributed._info_nce_loss_ways import Gathered, Ring
from m2ae_kernels.distributed._keys import NO_TARGET, Keys, check_gather, common_keys
from m2ae_kernels.distributed._ranks import Ranks
from m2ae_kernels.ops import info_nce_loss as on_one_rank
from m2ae_kernels.ops._checks import expect_dtype
from m2ae_kernels.ops._contrastive_arguments import (
    WORKSPACE,
    check_options,
    features,
    number,
    use_tf32,
)
from m2ae_kernels.ops._contrastive_pairs import SAME_ID, check_pairing
from m2ae_kernels.ops.info_nce_loss import FLOATING


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    gather: str = "all_gather",
    group: dist.ProcessGroup | None = None,
    even_batches: bool = False,
    logit_bias: float | Tensor | None = None,
    symmetric: bool = True,
    normalize: bool = False,
    eps: float = 1e-12,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "negative",
    allow_tf32: bool | None = None,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """This rank's share of m2ae_kernels.info_nce_loss of the queries and keys of all ranks.

    Every rank calls it, with its own rows, and later calls backward. The mean of what they return
    is the loss of one process that has all rows, in the order of the ranks. Gradients are those of
    the sum, over the ranks, of what they return, each times its own upstream gradient; so that
    averaging the gradients of the parameters over the ranks, as DistributedDataParallel does,
    gives those of that one process, that of logit_scale included. Do not scale by the number of
    ranks. Batches may differ in size: a rank with more rows has the larger share.

    Args:
        query: this rank's anchors, [n, D]; float32, bfloat16 or float16.
        key: this rank's candidates, [m, D], m >= n: row i is the positive of query i, rows from n
            on are further negatives. In the dtype of `query`.
        logit_scale: factor on the similarities, already exponentiated, the same on every rank: a
            number, or a tensor of one element, which gets its gradient.
        gather: "all_gather" has all keys at once, m times the number of ranks; "ring" one rank's
            at a time, which arrive while the ones before are compared, and have to come by again
            in the backward. Same numbers up to rounding.
        group: the process group, None being all ranks. Where torch.distributed is not initialized,
            there is one rank.
        even_batches: whether the caller knows that all ranks have the same m. Otherwise they tell
            each other before; the host waits for that, and with a group that communicates by the
            GPU alone it waits for the GPU, too.
        logit_bias: cancels, gradient 0; as in m2ae_kernels.info_nce_loss.
        symmetric: (query to key + key to query) / 2, or query to key alone.
        normalize: divide each row by its norm first.
        eps: smallest norm to divide by, > 0.
        query_mask: [n] bool, False is absent. On every rank or on none, as the following.
        key_mask: [m] bool, the same for keys.
        query_ids: group of each query, [n] int64; ids are compared across ranks.
        key_ids: group of each key, [m] int64.
        same_id: what pairs of one id are beside the targets: "negative", "ignore", "positive".
        allow_tf32: as in m2ae_kernels.info_nce_loss.
        max_workspace_bytes: as in m2ae_kernels.info_nce_loss, on each rank.

    Returns:
        A float32 scalar. Differentiable once with respect to query, key and logit_scale.

    Precision is that of m2ae_kernels.info_nce_loss. The parts of a key's gradient are rounded to
    its dtype on each rank and summed in float32.

    Raises:
        ValueError: as m2ae_kernels.info_nce_loss; gather is not as above; this rank is not in
            `group`; the ranks do not agree on D, dtype, or which masks and ids there are (unless
            even_batches, under which that is not looked at).
        TypeError: a dtype or a device is not as above.
    """
    op = "info_nce_loss"
    check_gather(op, gather)
    ranks = Ranks.of(op, group)
    if ranks.size == 1:
        loss: Tensor = on_one_rank(
            query,
            key,
            logit_scale,
            logit_bias=logit_bias,
            symmetric=symmetric,
            normalize=normalize,
            eps=eps,
            query_mask=query_mask,
            key_mask=key_mask,
            query_ids=query_ids,
            key_ids=key_ids,
            same_id=same_id,
            allow_tf32=allow_tf32,
            max_workspace_bytes=max_workspace_bytes,
        )
        return loss
    for name, side in {"query": query, "key": key}.items():
        expect_dtype(op, name, side, FLOATING)
    query, key = features(op, query, key)
    n, m, device = query.shape[0], key.shape[0], query.device
    check_options(op, eps, "mean", max_workspace_bytes)
    rows = (query_mask, key_mask, query_ids, key_ids)
    check_pairing(op, n, m, device, None, *rows, 0, NO_TARGET, same_id)
    scale = number(op, "logit_scale", logit_scale, torch.float32, device).float()
    # A query counts positives by id only if it has a target: of visiting keys, an absent one.
    spare = int(gather == "ring" and same_id == "positive")
    keys = Keys(key, key_mask, key_ids)
    keys = common_keys(op, ranks, query_mask, keys, even_batches, spare)
    options = Options(
        SAME_ID[same_id],
        normalize,
        eps,
        symmetric,
        use_tf32(query, allow_tf32),
        WORKSPACE if max_workspace_bytes is None else max_workspace_bytes,
        spare > 0,
    )
    way: Any = Gathered if gather == "all_gather" else Ring
    queries = Queries(query, query_mask, query_ids, scale)
    share: Tensor = way.apply(ranks, options, *queries, *keys)
    if logit_bias is None:
        return share
    bias = number(op, "logit_bias", logit_bias, share.dtype, device)
    return share + bias.reshape(1)[:0].sum()
