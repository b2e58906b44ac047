"""Losses between rows of one set of features, as modules with a fixed temperature."""

from torch import Tensor, nn

from m2ae_kernels.contrastive import nt_xent_loss, sup_con_loss


class _ViewLoss(nn.Module):
    def __init__(
        self, temperature: float, *, normalize: bool = True, reduction: str = "mean"
    ) -> None:
        super().__init__()
        if not temperature > 0:
            name = type(self).__name__
            raise ValueError(f"{name}: expected temperature > 0, got {temperature}")
        self.temperature = temperature
        self.normalize = normalize
        self.reduction = reduction

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature:g}, normalize={self.normalize},"
            f" reduction={self.reduction!r}"
        )


class NTXentLoss(_ViewLoss):
    """SimCLR's loss between two views of N items.

    Args:
        temperature: the similarities are divided by it, > 0.
        normalize: divide each row by its norm first.
        reduction: "mean", "sum" or "none".
    """

    def __init__(
        self, temperature: float = 0.5, *, normalize: bool = True, reduction: str = "mean"
    ) -> None:
        super().__init__(temperature, normalize=normalize, reduction=reduction)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """m2ae_kernels.nt_xent_loss of z1 [N, D] and z2 [N, D]: a scalar, or [2N]."""
        return nt_xent_loss(
            z1, z2, self.temperature, normalize=self.normalize, reduction=self.reduction
        )


class SupConLoss(_ViewLoss):
    """Supervised contrastive loss: the rows of one label are each other's positives.

    Args:
        temperature: the similarities are divided by it, > 0.
        normalize: divide each row by its norm first.
        reduction: "mean", "sum" or "none".
    """

    def __init__(
        self, temperature: float = 0.1, *, normalize: bool = True, reduction: str = "mean"
    ) -> None:
        super().__init__(temperature, normalize=normalize, reduction=reduction)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """m2ae_kernels.sup_con_loss of features [N, D] and labels [N] int64: a scalar, or [N]."""
        return sup_con_loss(
            features, labels, self.temperature, normalize=self.normalize, reduction=self.reduction
        )
