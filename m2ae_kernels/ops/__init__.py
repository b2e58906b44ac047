from m2ae_kernels.ops.ema_update import ema_update_
from m2ae_kernels.ops.expert_mlp import expert_mlp
from m2ae_kernels.ops.grouped_mm import grouped_mm
from m2ae_kernels.ops.info_nce_loss import info_nce_loss
from m2ae_kernels.ops.moe_permute import moe_permute
from m2ae_kernels.ops.moe_sort import moe_sort
from m2ae_kernels.ops.moe_unpermute import moe_unpermute
from m2ae_kernels.ops.patch_embed import patch_embed
from m2ae_kernels.ops.siglip_loss import siglip_loss
from m2ae_kernels.ops.topk_gating import topk_gating

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
