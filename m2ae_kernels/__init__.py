"""Fused operators for multimodal training, as drop-in PyTorch ops.

Each op is one name in four places: `m2ae_kernels.<op>` to call, `torch.ops.m2ae_kernels.<op>` under
the dispatcher, `m2ae_kernels.reference.<op>` as its plain-PyTorch definition, and
m2ae_kernels/ops/<op>.py to read. `python -m m2ae_kernels` prints which kernel serves which device.
On top of them, without kernels of their own: contrastive.py, moe.py, `m2ae_kernels.nn` with
modules, and `m2ae_kernels.distributed` with losses over the rows of several processes; and what
other libraries have it as: transformers_experts.py, routing_formats.py.

    import torch
    from m2ae_kernels import info_nce_loss
    images, texts = (torch.randn(4096, 256, requires_grad=True) for _ in range(2))
    scale = torch.tensor(14.3, requires_grad=True)
    info_nce_loss(images, texts, scale, normalize=True).backward()

docs/contrastive_losses.md has more, and measured figures; docs/mixture_of_experts.md the rest.
"""

from m2ae_kernels import distributed, nn, reference
from m2ae_kernels.contrastive import clip_loss, nt_xent_loss, sup_con_loss
from m2ae_kernels.moe import gate_topk, load_balancing_loss, router_entropy_loss, router_z_loss
from m2ae_kernels.ops import (
    ema_update_,
    expert_mlp,
    grouped_mm,
    info_nce_loss,
    moe_permute,
    moe_sort,
    moe_unpermute,
    patch_embed,
    siglip_loss,
    topk_gating,
)
from m2ae_kernels.ops._info_nce_loss_reduction import ContrastiveMetrics
from m2ae_kernels.ops._moe_routing import MoERouting
from m2ae_kernels.ops.topk_gating import TopkGatingOutput
from m2ae_kernels.routing_formats import from_routing_map, to_routing_map, vllm_topk_softmax
from m2ae_kernels.transformers_experts import register_transformers_experts

__all__ = [
    "ContrastiveMetrics",
    "MoERouting",
    "TopkGatingOutput",
    "clip_loss",
    "distributed",
    "ema_update_",
    "expert_mlp",
    "from_routing_map",
    "gate_topk",
    "grouped_mm",
    "info_nce_loss",
    "load_balancing_loss",
    "moe_permute",
    "moe_sort",
    "moe_unpermute",
    "nn",
    "nt_xent_loss",
    "patch_embed",
    "reference",
    "register_transformers_experts",
    "router_entropy_loss",
    "router_z_loss",
    "siglip_loss",
    "sup_con_loss",
    "to_routing_map",
    "topk_gating",
    "vllm_topk_softmax",
]
__version__ = "0.1.0"
