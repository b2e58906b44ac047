r"""A connector: from the latents of one modality to those of another, by a mixture of experts.

Per token, for the direction from modality m to modality t, with z_m its latent from an encoder that
need not be trained, E_m the embedding of the modality and E_pred, E_cl those of the two tasks:

    c       = GELU(W_m (z_m + E_m) + b_m)                      (2)
    u_task  = c + E_task,    task in {pred, cl}
    p       = softmax(W_g u + b_g),    S = the k largest of p
    MoE(u)  = sum over e in S of p_e Expert_e(u),    Expert = Linear, GELU, Dropout, Linear, Dropout
    f(u)    = GELU(LayerNorm_task(MoE(u))) + u
    z^_t    = W_pred f(u_pred) + b,    query = W_cl f(u_cl) + b,    key = W_key z_t + b    (3), (4)

each a mean over tokens in the end, which padding takes no part in. Heads are linear, so they come
after that mean. Both tasks share gate and experts, and are two streams of one call of the mixture:
one product of the gate, one sort, one grouped product per layer.

Source: Lei et al. 2025, "M3-JEPA: Multimodal alignment via multi-gate MoE based on the joint-
embedding predictive architecture" (arXiv 2409.05929), with the GELU in (2), LayerNorm, residual and
projected key that its code has and its equations leave out; without its flaw of averaging over
padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2ae.config import ConnectorConfig
from m2ae.dataclass_io import hint
from m2ae.models.blocks import masked_mean
from m2ae.models.pretrained import PretrainedModel
from m2ae.outputs import ConnectorOutput
from m2ae_kernels.nn import GroupedExperts, MoE, TopKRouter

TASKS = ("pred", "cl")  # rows of task_embedding


class MoEConnector(PretrainedModel):
    """Predicts the target's latent, and makes a query to find the target by.

    There is a direction for every ordered pair of modalities. What belongs to one direction or one
    modality has no gradient from the others; gate, experts, norms and task embeddings are shared.

    Args:
        config: modalities and sizes; kept as `self.config`.

    Raises:
        ValueError: a modality is called as an attribute of torch's module containers is.
    """

    config_type = ConnectorConfig
    config: ConnectorConfig

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        if taken := [name for name in config.dims if hasattr(nn.ModuleDict, name)]:
            raise ValueError(
                f"MoEConnector: expected names that nn.ModuleDict has no attribute of, got {taken}"
            )
        dims, d, E = config.dims, config.hidden_size, config.num_experts
        directions = {
            direction_name(source, target): dims[target]
            for source in dims
            for target in dims
            if source != target
        }
        self.modality_embedding = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(width)) for name, width in dims.items()}
        )
        self.in_proj = nn.ModuleDict({name: nn.Linear(width, d) for name, width in dims.items()})
        self.task_embedding = nn.Parameter(torch.empty(len(TASKS), d))
        self.moe = MoE(
            TopKRouter(d, E, config.top_k, bias=True, norm_topk_prob=config.norm_topk_prob),
            GroupedExperts(E, d, d, dropout_p=config.dropout, output_dropout_p=config.dropout),
        )
        self.norm = nn.ModuleDict({task: nn.LayerNorm(d) for task in TASKS})
        self.pred_head = nn.ModuleDict({n: nn.Linear(d, width) for n, width in directions.items()})
        self.cl_head = nn.ModuleDict({name: nn.Linear(d, d) for name in directions})
        self.target_proj = nn.ModuleDict(
            {name: nn.Linear(width, d) for name, width in dims.items()}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as M3-JEPA's code does: matrices and embeddings from U(-b, b), b^2 = 6 / inputs.

        That is He et al. 2015 with the gain of ReLU. Biases begin as 0, norms as the identity.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("norm."):
                nn.init.constant_(parameter, float(name.endswith("weight")))
            elif name.endswith((".bias", ".b1", ".b2")):
                nn.init.zeros_(parameter)
            else:
                bound = (6 / parameter.shape[-1]) ** 0.5
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, tokens: Tensor, source: str, target: str, mask: Tensor | None = None
    ) -> ConnectorOutput:
        """Connect one modality to another.

        Args:
            tokens: latents of the source, [B, N, d_source], or one for each item [B, d_source].
            source: the modality they are of.
            target: the modality to predict and to search.
            mask: [B, N] bool, True = a token, False = padding, which may hold anything, NaN
                included. None: all are tokens. An item without tokens has the output of f = 0.

        Returns:
            Prediction, query, and what the mixture's auxiliary losses need.

        Raises:
            ValueError: a modality is unknown, source is target, or a shape is not as above.
            TypeError: the mask is not bool.
        """
        direction = self._direction(source, target)
        tokens, mask = self._checked("forward", tokens, source, mask)

        c = F.gelu(self.in_proj[source](tokens + self.modality_embedding[source]))  # [B, N, d]
        mixed, routing = self.moe(c, shift=self.task_embedding, token_mask=mask)  # [2, B, N, d]
        f = {}
        for row, task in enumerate(TASKS):
            u = c + self.task_embedding[row]  # [B, N, d]
            f[task] = masked_mean(F.gelu(self.norm[task](mixed[row])) + u, mask)  # [B, d]
        prediction = self.pred_head[direction](f["pred"])  # [B, d_target]
        query = self.cl_head[direction](f["cl"])  # [B, d]
        return ConnectorOutput(prediction, query, routing)

    def project_target(self, tokens: Tensor, target: str, mask: Tensor | None = None) -> Tensor:
        """Keys that queries of any direction to this target are compared with, by cosine.

        Args:
            tokens: latents of the target, [B, N, d_target] or [B, d_target].
            target: the modality they are of.
            mask: [B, N] bool, as for `forward`.

        Returns:
            [B, d].

        Raises:
            ValueError: the modality is unknown, or a shape is not as above.
            TypeError: the mask is not bool.
        """
        self._check_modality("project_target", "target", target)
        tokens, mask = self._checked("project_target", tokens, target, mask)
        return self.target_proj[target](masked_mean(tokens, mask))

    def _direction(self, source: str, target: str) -> str:
        for role, name in (("source", source), ("target", target)):
            self._check_modality("forward", role, name)
        if source == target:
            raise ValueError(
                f"MoEConnector.forward: expected another target than the source, got {target!r}"
            )
        return direction_name(source, target)

    def _check_modality(self, function: str, role: str, name: str) -> None:
        if name not in self.config.dims:
            raise ValueError(
                f"MoEConnector.{function}: expected a known {role}, got {name!r};"
                f" {hint(name, self.config.dims)}"
            )

    def _checked(
        self, function: str, tokens: Tensor, modality: str, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, N, d_m] with zeros for padding, and the mask."""
        width = self.config.dims[modality]
        if tokens.dim() not in (2, 3) or tokens.shape[-1] != width:
            raise ValueError(
                f"MoEConnector.{function}: expected tokens of {modality} [B, N, {width}] or"
                f" [B, {width}], got {list(tokens.shape)}"
            )
        if mask is None:
            return (tokens if tokens.dim() == 3 else tokens[:, None]), None
        if mask.dtype != torch.bool:
            raise TypeError(f"MoEConnector.{function}: expected a mask of bool, got {mask.dtype}")
        if tokens.dim() == 2 or mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"MoEConnector.{function}: expected mask [B, N] of tokens [B, N, {width}], got"
                f" {list(mask.shape)} and {list(tokens.shape)}"
            )
        # 0 times the NaN of a padded token would be in the gradient of every weight.
        return torch.where(mask[..., None], tokens, 0), mask


def direction_name(source: str, target: str) -> str:
    """What a direction is called in parameter names, logs and figures."""
    return f"{source}_to_{target}"
