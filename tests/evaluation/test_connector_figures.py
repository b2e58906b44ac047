"""Held-out figures of a connector: right pairs, right heads, controls that control."""

import pytest
import torch

from m2ae.config import ConnectorConfig
from m2ae.data.features import FeatureSet
from m2ae.evaluation.connector import evaluate_connector
from m2ae.evaluation.retrieval import retrieval_metrics
from m2ae.evaluation.ridge import unit
from m2ae.modalities.features import Standardization
from m2ae.models.connector import MoEConnector

DIRECTIONS = [("image", "text"), ("text", "image")]
SIZES = {"train": 200, "val": 40, "test": 60}
WIDTH = 8


@pytest.fixture
def items():
    """Text is a rotation of image; 10 categories differ in 3 channels, their items in the others.

    Were the categories' centers in all channels, they would show the whole rotation by themselves.
    """
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    is_of_category = torch.arange(WIDTH) < 3
    centers = 4 * torch.randn(10, WIDTH) * is_of_category
    made = {}
    for split, n in SIZES.items():
        category = torch.arange(n) % 10
        image = centers[category] + torch.randn(n, WIDTH) * ~is_of_category
        made[split] = FeatureSet(
            ids=[f"{split} {row}" for row in range(n)],
            labels=[f"category {c}" for c in category.tolist()],
            features={"image": image, "text": image @ rotation},
            same=torch.arange(n),
        )
    return made


@pytest.fixture
def model():
    return MoEConnector(ConnectorConfig({"image": WIDTH, "text": WIDTH}, 16, 4, 2)).eval()


def without(items, split, **changes):
    old = items[split]
    parts = {name: getattr(old, name) for name in ("ids", "labels", "features", "same")}
    return items | {split: FeatureSet(**(parts | changes))}


def evaluate(model, items, directions=DIRECTIONS):
    standardize = Standardization.measure(items["train"].features)
    return evaluate_connector(model, standardize, items, directions)


def test_both_heads_are_scored_against_their_own_keys(model, items):
    standardize = Standardization.measure(items["train"].features)
    z = standardize(items["test"].features)
    for (source, target), figures in evaluate(model, items).items():
        with torch.no_grad():
            output = model(z[source], source, target)
            projected = model.project_target(z[target], target)
        for name, queries, keys in (
            ("prediction", output.prediction, z[target]),
            ("contrastive", output.query, projected),
        ):
            wanted = retrieval_metrics(unit(queries), unit(keys)).ranks
            assert torch.equal(figures.found[name].ranks, wanted)


def test_an_untrained_connector_is_near_chance_and_ridge_is_perfect(model, items):
    for figures in evaluate(model, items).values():
        assert figures.found["ridge"].recall[1] == 100  # a rotation is linear
        # Chance R@10 is 16.7 %; of 60 items the standard error is 4.8 points, and untrained heads
        # may carry a category over.
        assert figures.found["prediction"].recall[10] < 60
        assert figures.found["ridge"].chance[10] == pytest.approx(100 / 6)


def test_the_control_knows_categories_and_no_items(model, items):
    figures = evaluate(model, items)["image", "text"]
    # 10 categories of 6: who knows the category alone has R@1 1/6 and R@10 near 1.
    assert 8 < figures.shuffled[1] < 30
    assert figures.shuffled[10] > 70
    alone = [f"alone {row}" for row in range(SIZES["train"])]
    true = evaluate(model, without(items, "train", labels=alone))["image", "text"]
    assert true.shuffled == figures.found["ridge"].recall  # nothing to shuffle in categories of one


def test_figures_for_json(model, items):
    figures = evaluate(model, items)["text", "image"].to_dict()
    assert set(figures) == {
        "protocol", "prediction", "contrastive", "ridge", "ridge_shuffled_in_category", "chance",
    }  # fmt: skip
    assert figures["protocol"] == "1:1, 60 queries, 60 keys"
    low, high = figures["prediction"]["R@10"]["interval"]
    assert low <= figures["prediction"]["R@10"]["percent"] <= high
    assert figures["ridge"]["penalty"] > 0
    assert figures["chance"]["R@1"] == pytest.approx(100 / 60)


def test_what_cannot_be_computed_is_left_out(model, items):
    unlabelled = [None, *items["train"].labels[1:]]
    figures = evaluate(model, without(items, "train", labels=unlabelled))["image", "text"]
    assert figures.shuffled is None
    assert "ridge" in figures.found
    nothing = {name: rows[:0] for name, rows in items["val"].features.items()}
    empty = without(items, "val", ids=[], labels=[], features=nothing, same=items["val"].same[:0])
    figures = evaluate(model, empty)["image", "text"].to_dict()
    assert "ridge" not in figures
    assert figures["ridge_shuffled_in_category"] is None


def test_no_test_items_is_an_error(model, items):
    nothing = {name: rows[:0] for name, rows in items["test"].features.items()}
    with pytest.raises(ValueError, match="expected test items, got none"):
        evaluate(model, without(items, "test", ids=[], labels=[], features=nothing))
