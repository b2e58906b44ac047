"""What each op means, in plain PyTorch, under the op's name: any device, differentiable."""

from m2ae_kernels.ops.ema_update import reference as ema_update_
from m2ae_kernels.ops.expert_mlp import reference as expert_mlp
from m2ae_kernels.ops.grouped_mm import reference as grouped_mm
from m2ae_kernels.ops.info_nce_loss import reference as info_nce_loss
from m2ae_kernels.ops.moe_permute import reference as moe_permute
from m2ae_kernels.ops.moe_sort import reference as moe_sort
from m2ae_kernels.ops.moe_unpermute import reference as moe_unpermute
from m2ae_kernels.ops.patch_embed import reference as patch_embed
from m2ae_kernels.ops.siglip_loss import reference as siglip_loss
from m2ae_kernels.ops.topk_gating import reference as topk_gating

__all__ = [
    "ema_update_",
    "expert_mlp",
    "grouped_mm",
    "info_nce_loss",
    "moe_permute",
    "moe_sort",
    "moe_unpermute",
    "patch_embed",
    "siglip_loss",
    "topk_gating",
]
