from m2ae_kernels.ops.ema_update import ema_update_
from m2ae_kernels.ops.expert_mlp import expert_mlp
from m2ae_kernels.ops.grouped_mm import grouped_mm
from m2ae_kernels.ops.info_nce_loss import info_nce_loss
from m2ae_kernels.ops.patch_embed import patch_embed
from m2ae_kernels.ops.siglip_loss import siglip_loss
from m2ae_kernels.ops.topk_gating import topk_gating

__all__ = [
    "ema_update_",
    "expert_mlp",
    "grouped_mm",
    "info_nce_loss",
    "patch_embed",
    "siglip_loss",
    "topk_gating",
]
