"""The contrastive losses and the mixture of experts as modules.

The losses have a temperature of their own, or open_clip's shape.
"""

from m2ae_kernels.nn.clip_loss import ClipLoss
from m2ae_kernels.nn.grouped_experts import GroupedExperts
from m2ae_kernels.nn.info_nce_loss import InfoNCELoss
from m2ae_kernels.nn.moe import MoE
from m2ae_kernels.nn.siglip_loss import SigLipLoss
from m2ae_kernels.nn.topk_router import TopKRouter
from m2ae_kernels.nn.view_losses import NTXentLoss, SupConLoss

__all__ = [
    "ClipLoss",
    "GroupedExperts",
    "InfoNCELoss",
    "MoE",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "TopKRouter",
]
