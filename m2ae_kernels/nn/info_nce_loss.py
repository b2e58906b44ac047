"""info_nce_loss with a temperature that learns."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from m2ae_kernels.ops.info_nce_loss import info_nce_loss


class InfoNCELoss(nn.Module):
    """info_nce_loss, and the scale of its logits as a parameter.

    The parameter, or buffer if it does not learn, is logit_scale = ln(1 / temperature), 0-d, as in
    CLIP. The scale never exceeds max_scale. In training mode a parameter beyond the limit is first
    put back on it, as CLIP's training loop does after each step: a clamp of its value alone would
    have no gradient there, and a step too far could never be taken back.

    Args:
        temperature: where the temperature begins, > 0.
        learnable: whether it is a parameter.
        max_scale: limit of 1 / temperature, > 0. math.inf is none.
        symmetric: both directions, or query to key alone.
        normalize: divide each row by its norm first.
        same_id: what pairs of one id are beside the targets: "negative", "ignore" or "positive".
        label_smoothing: share of the target that is spread over all keys, in [0, 1).
        reduction: "mean", "sum" or "none".
    """

    logit_scale: Tensor  # []

    def __init__(
        self,
        temperature: float = 0.07,
        learnable: bool = True,
        max_scale: float = 100.0,
        *,
        symmetric: bool = True,
        normalize: bool = False,
        same_id: str = "negative",
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("max_scale", max_scale)):
            if not value > 0:
                raise ValueError(f"InfoNCELoss: expected {name} > 0, got {value}")
        logit_scale = torch.tensor(-math.log(temperature))
        if learnable:
            self.logit_scale = nn.Parameter(logit_scale)
        else:
            self.register_buffer("logit_scale", logit_scale)
        self.max_scale = max_scale
        self.symmetric = symmetric
        self.normalize = normalize
        self.same_id = same_id
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def scale(self) -> Tensor:
        """1 / temperature, 0-d, at most max_scale."""
        limit = math.log(self.max_scale)
        if self.training and self.logit_scale.requires_grad:
            with torch.no_grad():
                self.logit_scale.clamp_(max=limit)
            # The backward of exp keeps its result, not the parameter, so that a second call may
            # write to the parameter before the first one's backward.
            return self.logit_scale.exp()
        return self.logit_scale.clamp(max=limit).exp()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        target: Tensor | None = None,
        query_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Any:
        """m2ae_kernels.info_nce_loss of query [N, D] and key [M, D], with its shapes and errors.

        Args:
            query: anchors, [N, D].
            key: candidates, [M, D].
            target: key of each query's positive, [N] int64; None is arange(N).
            query_mask: [N] bool, False is absent.
            key_mask: [M] bool, False is absent.
            query_ids: group of each query, [N] int64.
            key_ids: group of each key, [M] int64.
            weight: factor on each query's losses, [N].

        Returns:
            A float32 scalar; with reduction="none" the pair (loss_q [N], loss_k [M]).
        """
        return info_nce_loss(
            query,
            key,
            self.scale(),
            target=target,
            symmetric=self.symmetric,
            normalize=self.normalize,
            query_mask=query_mask,
            key_mask=key_mask,
            query_ids=query_ids,
            key_ids=key_ids,
            same_id=self.same_id,
            label_smoothing=self.label_smoothing,
            weight=weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"learnable={isinstance(self.logit_scale, nn.Parameter)}, max_scale={self.max_scale:g},"
            f" symmetric={self.symmetric}, normalize={self.normalize}, same_id={self.same_id!r},"
            f" label_smoothing={self.label_smoothing:g}, reduction={self.reduction!r}"
        )
