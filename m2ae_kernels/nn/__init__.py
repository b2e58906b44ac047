"""The contrastive losses as modules: with a temperature of their own, or in open_clip's shape."""

from m2ae_kernels.nn.clip_loss import ClipLoss
from m2ae_kernels.nn.info_nce_loss import InfoNCELoss
from m2ae_kernels.nn.siglip_loss import SigLipLoss
from m2ae_kernels.nn.view_losses import NTXentLoss, SupConLoss

__all__ = ["ClipLoss", "InfoNCELoss", "NTXentLoss", "SigLipLoss", "SupConLoss"]
