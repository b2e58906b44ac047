r"""Ridge regression between features: what a connector has to beat, in closed form and float64.

    W = argmin |X W - Y|^2 + penalty |W|^2 = (X^T X + penalty)^-1 X^T Y      X, Y centered

With X^T X = V diag(s) V^T, one decomposition serves every penalty and every Y.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from m2ae.evaluation.retrieval import retrieval_metrics

# Times the mean eigenvalue of X^T X: from hardly any shrinking to little but the mean left.
PENALTIES = tuple(10.0 ** (half / 2) for half in range(-6, 7))


class Ridge:
    """Every ridge regression on the same inputs.

    Args:
        x: [n, D] training inputs, n >= 2; taken to float64.
    """

    def __init__(self, x: Tensor) -> None:
        x = x.double()
        self.mean = x.mean(dim=0)  # [D]
        centered = x - self.mean
        self.values, self.vectors = torch.linalg.eigh(centered.T @ centered)  # [D], [D, D]
        self.rotated = centered @ self.vectors  # [n, D]

    def fit(self, y: Tensor) -> "RidgeFit":
        """For one choice of outputs.

        Args:
            y: [n, K] training outputs.

        Returns:
            Predictions for every penalty.
        """
        y = y.double()
        mean = y.mean(dim=0)
        return RidgeFit(self, self.rotated.T @ (y - mean), mean)


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """Every ridge regression from the same inputs to the same outputs."""

    ridge: Ridge
    product: Tensor  # [D, K], V^T X^T Y
    mean: Tensor  # [K] of the outputs

    def predict(self, penalty: float, queries: Tensor) -> Tensor:
        """Outputs of new inputs.

        Args:
            penalty: above 0, times the mean eigenvalue of X^T X.
            queries: [Q, D] inputs.

        Returns:
            [Q, K] float64.
        """
        values = self.ridge.values
        weight = self.product / (values + penalty * values.mean())[:, None]  # [D, K], rotated
        return (queries.double() - self.ridge.mean) @ self.ridge.vectors @ weight + self.mean


def choose_penalty(fit: RidgeFit, queries: Tensor, keys: Tensor) -> float:
    """The penalty of PENALTIES by which validation items are found best.

    Args:
        fit: of the training items.
        queries: [Q, D] validation inputs.
        keys: [Q, K] validation outputs; key i belongs to query i.

    Returns:
        That with the highest mean reciprocal rank; the least of equals.
    """

    def quality(penalty: float) -> float:
        found = retrieval_metrics(unit(fit.predict(penalty, queries)), unit(keys))
        return float(found.ranks.double().reciprocal().mean())

    return max(PENALTIES, key=quality)


def shuffled_within(labels: Sequence[str], seed: int) -> Tensor:
    """A random order that moves every row to a row of its own category.

    A map that is trained on pairs in this order can learn what a category has in common, and
    nothing of single items.

    Args:
        labels: the category of each of n rows.
        seed: of the order.

    Returns:
        int64 [n], a permutation.
    """
    generator = Generator().manual_seed(seed)
    order = torch.arange(len(labels))
    rows_of: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows_of.setdefault(label, []).append(row)
    for rows in rows_of.values():
        order[rows] = torch.tensor(rows)[torch.randperm(len(rows), generator=generator)]
    return order


def unit(rows: Tensor) -> Tensor:
    """Rows [n, D] divided by their norms, so that products are cosines."""
    return F.normalize(rows, dim=1)
