"""Mean squared errors of images and texts over the items that have them."""

from torch import Tensor

from m2ae.losses.masked import masked_difference, mean_over_mask


def image_reconstruction_loss(prediction: Tensor, target: Tensor, present: Tensor) -> Tensor:
    """Mean squared error of pixels.

    Args:
        prediction: [B, 3, H, W].
        target: [B, 3, H, W], pixels in [0, 1], taken as a constant.
        present: [B] bool, True = the item has an image. Where it has none, neither side is used.

    Returns:
        0-d, the mean over items that have an image; 0 if none has.
    """
    difference = masked_difference(prediction, target, present)
    return mean_over_mask(difference.square(), present)


def text_reconstruction_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of token embeddings.

    The target is taken as a constant: a table that learned from this loss would shrink all its rows
    to one point, where the error is 0 and the texts are lost.

    Args:
        prediction: [B, T', D] with T' >= T; positions from T on are not looked at.
        target: [B, T, D], taken as a constant.
        mask: [B, T] bool, True = a token of a text that is there. Elsewhere neither side is used.

    Returns:
        0-d, the mean over tokens, of which long texts have more; 0 if there is none.
    """
    difference = masked_difference(prediction[:, : target.shape[1]], target, mask)
    return mean_over_mask(difference.square(), mask)
