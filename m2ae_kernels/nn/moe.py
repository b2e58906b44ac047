"""A mixture of experts: a router, experts, and the sort between them."""

from typing import Literal

import torch
from torch import Tensor, nn

from m2ae_kernels.nn.grouped_experts import GroupedExperts
from m2ae_kernels.nn.topk_router import TopKRouter
from m2ae_kernels.ops.moe_sort import moe_sort


class MoE(nn.Module):
    """Each token goes through the k experts that the router chooses, and their weighted sum is out.

    All streams go through one product of the router, one sort and one product per layer of the
    experts; only rows that an expert was chosen for are computed.

    Args:
        router: whose num_experts and dim are those of `experts`.
        experts: what the tokens go through.
        shared_expert: a module from [..., D] to [..., Do] that every token goes through as well.
        capacity: most rows that an expert takes; None is no limit. What is beyond it adds nothing
            to its token, and the weights of the others stay as they are.
        drop_policy: who is dropped then: as in moe_sort.

    Raises:
        ValueError: router and experts do not fit.

    Source: Shazeer et al. 2017, "Outrageously large neural networks", equation 1.
    """

    def __init__(
        self,
        router: TopKRouter,
        experts: GroupedExperts,
        *,
        shared_expert: nn.Module | None = None,
        capacity: int | None = None,
        drop_policy: Literal["position", "slot", "prob"] = "position",
    ) -> None:
        super().__init__()
        ours, theirs = ((module.num_experts, module.dim) for module in (router, experts))
        if ours != theirs:
            raise ValueError(
                f"MoE: expected experts with the router's (num_experts, dim) = {ours}, got {theirs}"
            )
        self.router, self.experts, self.shared_expert = router, experts, shared_expert
        self.capacity, self.drop_policy = capacity, drop_policy

    def forward(
        self, x: Tensor, *, shift: Tensor | None = None, token_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Route, compute and combine.

        Args:
            x: [..., D]; float32, bfloat16 or float16. T is the product of the leading axes.
            shift: [S, D]: S streams, of x + shift[s], for router and experts.
            token_mask: bool, [T] or the leading axes; a token with False is not routed, gives 0,
                and may hold NaN (but not beside a shared expert).

        Returns:
            [..., Do], or [S, ..., Do] with `shift`; and what the auxiliary losses need, over the
            rows of all streams: logsumexp [R], tokens_per_expert [E] before any is dropped, and,
            unless the router leaves them out, entropy [R] and probs_sum [E].
        """
        leading = x.shape[:-1]
        rows = x.reshape(-1, x.shape[-1])
        mask = None if token_mask is None else token_mask.flatten()
        gating = self.router(rows, shift=shift, token_mask=mask)
        routing = moe_sort(
            gating.topk_ids,
            self.experts.num_experts,
            capacity=self.capacity,
            drop_policy=self.drop_policy,
            topk_weights=gating.topk_weights.detach() if self.drop_policy == "prob" else None,
        )
        out = self.experts(rows, gating.topk_weights, gating.topk_ids, routing=routing, shift=shift)
        streams = () if shift is None else (len(shift),)
        out = out.view(*streams, *leading, out.shape[-1])
        if self.shared_expert is not None:
            shifted = x if shift is None else torch.stack([x + row for row in shift])
            out = out + self.shared_expert(shifted)
        for_losses = {
            "logsumexp": gating.logsumexp,
            "entropy": gating.entropy,
            "probs_sum": gating.probs_sum,
            "tokens_per_expert": gating.tokens_per_expert,
        }
        return out, {name: tensor for name, tensor in for_losses.items() if tensor is not None}
