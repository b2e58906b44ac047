"""How a trained connector finds held-out items, beside what it has to be read against.

Beside both heads of the connector stand chance, ridge regression (its penalty chosen on validation
items), and ridge regression on training pairs that are shuffled inside their category: it can learn
from categories and not from items, and only what is above it is due to single items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m2ae.data.features import FeatureSet
from m2ae.evaluation.retrieval import (
    DEFAULT_KS,
    RetrievalMetrics,
    confidence_interval,
    retrieval_metrics,
)
from m2ae.evaluation.ridge import Ridge, RidgeFit, choose_penalty, shuffled_within, unit
from m2ae.modalities.features import Standardization
from m2ae.models.connector import MoEConnector

SHUFFLES = 5  # orders that the control is the mean of


@dataclass(frozen=True, eq=False)
class ConnectorFigures:
    """Of one direction, source to target, among held-out items."""

    found: dict[str, RetrievalMetrics]  # by "prediction" and "contrastive" head, and "ridge"
    penalty: float | None  # of ridge regression; None without validation items, and no "ridge" then
    shuffled: dict[int, float] | None  # k to recall of the control; None without labels or ridge

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON; intervals are 95 % bootstraps over the items."""
        metrics = self.found["prediction"]
        figures: dict[str, Any] = {"protocol": metrics.protocol}
        for name, found in self.found.items():
            figures[name] = {
                "median_rank": found.median_rank,
                "ties_for_the_query": found.optimistic_recall,  # None: no ties that matter
                **{
                    f"R@{k}": {
                        "percent": found.recall[k],
                        "interval": confidence_interval(found.ranks <= k, seed=0),
                    }
                    for k in found.recall
                },
            }
        if self.penalty is not None:
            figures["ridge"]["penalty"] = self.penalty
        figures["ridge_shuffled_in_category"] = _named(self.shuffled)
        figures["chance"] = _named(metrics.chance)
        return figures


@torch.no_grad()
def evaluate_connector(
    model: MoEConnector,
    standardize: Standardization,
    items: Mapping[str, FeatureSet],
    directions: Sequence[tuple[str, str]],
) -> dict[tuple[str, str], ConnectorFigures]:
    """Find every test item's partner among those of all test items.

    Args:
        model: in eval mode.
        standardize: what it was trained behind.
        items: "train" and "val" for the baselines, "test" to find.
        directions: source and target modality.

    Returns:
        The figures of each direction.

    Raises:
        ValueError: there is no test item.
    """
    if not len(items["test"]):
        raise ValueError("evaluate_connector: expected test items, got none")
    z = {split: standardize(found.features) for split, found in items.items()}
    return {
        (source, target): _direction(model, z, items["train"].labels, source, target)
        for source, target in directions
    }


def _direction(
    model: MoEConnector,
    z: Mapping[str, Mapping[str, Tensor]],
    labels: Sequence[str | None],
    source: str,
    target: str,
) -> ConnectorFigures:
    device = next(model.parameters()).device
    queries, keys = z["test"][source], z["test"][target]
    output = model(queries.to(device), source, target)
    projected = model.project_target(keys.to(device), target)
    found = {
        "prediction": retrieval_metrics(unit(output.prediction.cpu()), unit(keys)),
        "contrastive": retrieval_metrics(unit(output.query.cpu()), unit(projected.cpu())),
    }
    if not len(z["val"][source]):
        return ConnectorFigures(found, None, None)

    ridge, y = Ridge(z["train"][source]), z["train"][target]
    fit = ridge.fit(y)
    penalty = choose_penalty(fit, z["val"][source], z["val"][target])

    def by_ridge(fit: RidgeFit) -> RetrievalMetrics:
        return retrieval_metrics(unit(fit.predict(penalty, queries)), unit(keys))

    found["ridge"] = by_ridge(fit)
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        return ConnectorFigures(found, penalty, None)
    orders = (shuffled_within(known, seed) for seed in range(SHUFFLES))
    controls = [by_ridge(ridge.fit(y[order])).recall for order in orders]
    mean = {k: sum(recall[k] for recall in controls) / SHUFFLES for k in DEFAULT_KS}
    return ConnectorFigures(found, penalty, mean)


def _named(recall: Mapping[int, float] | None) -> dict[str, float] | None:
    return None if recall is None else {f"R@{k}": value for k, value in recall.items()}
