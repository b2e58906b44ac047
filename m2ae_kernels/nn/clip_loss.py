"""CLIP's loss with the signatures of open_clip's ClipLoss."""

from torch import Tensor, nn

from m2ae_kernels import distributed
from m2ae_kernels.contrastive import clip_loss
from m2ae_kernels.distributed._keys import check_gather
from m2ae_kernels.distributed._ranks import check_ranks, global_value


class ClipLoss(nn.Module):
    """open_clip's ClipLoss, without the matrix of logits.

    Over several ranks the gradients are exact for every choice of arguments: averaged over the
    ranks, as DistributedDataParallel does, they are those of one process with all rows. That is
    what open_clip gives with gather_with_grad=True; without it, its features get a part of their
    gradient, or 1 / world_size of it. Local batches may differ in size.

    Args:
        local_loss: over several ranks, return this rank's share, the mean of which over the ranks
            is the loss; False returns the loss itself on every rank, by one more sum of a number.
            The gradients are the same.
        gather_with_grad: accepted; the gradients always include those through the gathering.
        cache_labels: accepted; there are no labels to cache.
        rank: this process among the `world_size` of the default process group.
        world_size: 1 compares the rows of this process alone.
        use_horovod: has to be False.
        gather: how the text features travel; as in m2ae_kernels.distributed.info_nce_loss.
        even_batches: whether the caller knows that all ranks have as many rows; as there.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        gather: str = "all_gather",
        even_batches: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError(
                "ClipLoss: expected use_horovod=False, got True; features travel by"
                " torch.distributed alone"
            )
        check_gather("ClipLoss", gather)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.gather = gather
        self.even_batches = even_batches

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The mean of both directions' cross entropies.

        Args:
            image_features: [N, D], normalized by the caller.
            text_features: [N, D], the pair of image i in row i.
            logit_scale: factor on the similarities, already exponentiated; gets its gradient.
            logit_bias: cancels; gets the gradient 0.
            output_dict: return {"contrastive_loss": loss}.

        Returns:
            A float32 scalar, or a dictionary with it.
        """
        if self.world_size == 1:
            loss = clip_loss(image_features, text_features, logit_scale, logit_bias)
        else:
            check_ranks("ClipLoss", self.rank, self.world_size)
            loss = distributed.info_nce_loss(
                image_features,
                text_features,
                logit_scale,
                logit_bias=logit_bias,
                gather=self.gather,
                even_batches=self.even_batches,
            )
            if not self.local_loss:
                loss = global_value(loss)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return (
            f"local_loss={self.local_loss}, rank={self.rank}, world_size={self.world_size},"
            f" gather={self.gather!r}, even_batches={self.even_batches}"
        )
