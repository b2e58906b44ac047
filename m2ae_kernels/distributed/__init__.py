"""The contrastive losses over the rows of all ranks, without their matrix on any.

Each rank passes its own rows, and gets its share of the loss: the mean of the shares over the ranks
is the loss of one process that has all rows. The gradients are those of the sum of the shares, so
that after DistributedDataParallel's averaging every parameter, a learned scale or bias included,
has the gradient of that one process.
"""

from m2ae_kernels.distributed.info_nce_loss import info_nce_loss
from m2ae_kernels.distributed.siglip_loss import siglip_loss

__all__ = ["info_nce_loss", "siglip_loss"]
