"""The sigmoid loss with the signatures of open_clip's SigLipLoss."""

from torch import Tensor, nn

from m2ae_kernels import distributed
from m2ae_kernels.distributed._ranks import check_ranks
from m2ae_kernels.ops.siglip_loss import siglip_loss

GATHER = {"bidir": "ring", "shift": "ring", "reduce": "all_gather", "gather": "all_gather"}


class SigLipLoss(nn.Module):
    """open_clip's SigLipLoss, without the matrix of logits.

    Over several ranks it returns, as open_clip's does, this rank's images with all texts, divided
    by the number of this rank's images. Local batches may differ in size: see
    m2ae_kernels.distributed.siglip_loss, also for the gradients, which are exact.

    Args:
        cache_labels: accepted; there are no labels to cache.
        rank: this process among the `world_size` of the default process group.
        world_size: 1 compares the rows of this process alone.
        dist_impl: how the text features travel: "bidir", which is None, and "shift" are from rank
            to rank; "reduce" and "gather" are all at once. Same numbers up to rounding.
        chunk_size: accepted; the matrix is never held, whatever it is.
        even_batches: whether the caller knows that all ranks have as many rows; as in
            m2ae_kernels.distributed.siglip_loss.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        even_batches: bool = False,
    ) -> None:
        super().__init__()
        dist_impl = dist_impl or "bidir"
        if dist_impl not in GATHER:
            raise ValueError(
                f"SigLipLoss: expected dist_impl {', '.join(GATHER)} or None, got {dist_impl!r}"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.chunk_size = chunk_size
        self.even_batches = even_batches

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Binary cross entropy of each pair, summed, divided by the number of images.

        Args:
            image_features: [N, D], normalized by the caller.
            text_features: [N, D], the pair of image i in row i.
            logit_scale: factor on the similarities, already exponentiated; gets its gradient.
            logit_bias: what is added to each logit; gets its gradient. None is 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A float32 scalar, or a dictionary with it.
        """
        bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            loss = siglip_loss(image_features, text_features, logit_scale, bias)
        else:
            check_ranks("SigLipLoss", self.rank, self.world_size)
            loss = distributed.siglip_loss(
                image_features,
                text_features,
                logit_scale,
                bias,
                gather=GATHER[self.dist_impl],
                even_batches=self.even_batches,
            )
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return (
            f"rank={self.rank}, world_size={self.world_size}, dist_impl={self.dist_impl!r},"
            f" even_batches={self.even_batches}"
        )
