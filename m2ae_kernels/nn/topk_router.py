"""A linear layer and top-k gating: which experts a token goes to."""

from typing import Any

import torch
from torch import Tensor, nn

from m2ae_kernels.moe import gate_topk
from m2ae_kernels.ops.topk_gating import TopkGatingOutput


class TopKRouter(nn.Module):
    """Logits of each token for each expert, in float32, and the k best of them.

    Parameters are weight [E, D] and, if asked for, bias [E], both drawn as in nn.Linear. The buffer
    e_score_correction_bias [E], if asked for, begins as zeros and is added for selection alone; it
    has no gradient, is what a balancing rule writes to, and stays float32 whatever the module is
    cast to: in 16 bits its small steps would be lost.

    Args:
        dim: D, channels of a token.
        num_experts: E.
        top_k: experts per token, 1 <= k <= E.
        bias: whether the layer has one.
        use_expert_bias: whether there is e_score_correction_bias.
        device: of the parameters.
        dtype: of the parameters; float32 is advised whatever that of the tokens is.
        gating_options: keyword arguments of topk_gating, but those that forward takes. Entropy and
            probs_sum are returned unless switched off.

    Raises:
        ValueError: top_k is out of range.
        TypeError: an option that topk_gating does not have.
    """

    e_score_correction_bias: Tensor | None  # [E] float32

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        use_expert_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **gating_options: Any,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"TopKRouter: expected 1 <= top_k <= num_experts = {num_experts}, got {top_k}"
            )
        if unknown := sorted(set(gating_options) - OPTIONS):
            raise TypeError(f"TopKRouter: expected options of {sorted(OPTIONS)}, got {unknown}")
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.gating_options = {"return_entropy": True, "return_probs_sum": True, **gating_options}
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, dim, **placed))
        self.bias = nn.Parameter(torch.empty(num_experts, **placed)) if bias else None
        correction = torch.zeros(num_experts, device=device) if use_expert_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias from U(-D^-1/2, D^-1/2)."""
        bound = max(self.dim, 1) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _apply(self, fn: Any, recurse: bool = True) -> "TopKRouter":
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            self.e_score_correction_bias = before.to(after.device)
        return self

    def forward(
        self, x: Tensor, *, shift: Tensor | None = None, token_mask: Tensor | None = None
    ) -> TopkGatingOutput:
        """Route each token.

        Args:
            x: [..., D].
            shift: [S, D]: S routings, of x + shift[s]; row s T + t of the outputs.
            token_mask: bool, [T] or the leading axes of `x`; a token with False is not routed.

        Returns:
            What topk_gating returns.
        """
        return gate_topk(
            x,
            self.weight,
            self.bias,
            top_k=self.top_k,
            shift=shift,
            token_mask=token_mask,
            expert_bias=self.e_score_correction_bias,
            **self.gating_options,
        )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}"


OPTIONS = {
    "score_function",
    "norm_topk_prob",
    "n_group",
    "topk_group",
    "group_score",
    "routed_scaling_factor",
    "return_entropy",
    "return_probs_sum",
    "nan_policy",
}
