"""Training a connector: it learns, repeats itself, says what it did, stops where it must."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file
from small_connector_recipe import small_connector_recipe

from m2ae.config import ConnectorConfig
from m2ae.modalities.features import Standardization
from m2ae.models.connector import MoEConnector
from m2ae.training.connector_run import run_connector_recipe
from m2ae.training.connector_trainer import ConnectorTrainer
from m2ae.training.optim import make_optimizer
from m2ae.training.recipe import TrainConfig, load_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = small_connector_recipe(steps=100, lr=0.01)
    return folder, recipe, run_connector_recipe(recipe, folder, quiet=True)


def test_every_term_falls_in_both_directions(run):
    _, _, made = run
    for direction in ("image_to_text", "text_to_image"):
        rows = [row for row in made.log.rows if row.get("direction") == direction]
        assert len(rows) == rows[-1]["steps_of_direction"] == 50
        for term in ("loss", "pred", "cl"):
            first, last = (sum(row[term] for row in part) / 5 for part in (rows[:5], rows[-5:]))
            assert last < first, (direction, term)
    assert made.steps_of == {("image", "text"): 50, ("text", "image"): 50}


def test_the_bound_is_log_n_less_the_contrast(run):
    _, _, made = run
    row = made.log.rows[0]
    assert row["mi_bound"] == pytest.approx(math.log(32) - row["cl"])
    assert row["loss"] == pytest.approx(0.5 * row["pred"] + 0.5 * row["cl"], rel=1e-5)
    validation = next(row for row in made.log.rows if "val_loss" in row)
    assert validation["val_mi_bound"] == pytest.approx(math.log(143) - validation["val_cl"])
    both = [validation[f"val_cl_{name}"] for name in ("image_to_text", "text_to_image")]
    assert validation["val_cl"] == pytest.approx(sum(both) / 2)


def test_routing_is_logged(run):
    _, _, made = run
    row = made.log.rows[0]
    assert 0 < row["router_entropy"] <= math.log(4)
    assert 0.25 <= row["largest_share"] <= 0.5  # of 4 experts; each token has 2 that differ


def test_the_folder_holds_the_run(run):
    folder, recipe, made = run
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint", "log.jsonl", "recipe.yaml",
    ]  # fmt: skip
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == made.log.rows
    assert load_recipe(folder / "recipe.yaml") == recipe
    loaded = MoEConnector.from_pretrained(folder / "checkpoint")
    for (name, x), (_, y) in zip(
        made.model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(x, y), name
    standardize = Standardization.load(folder / "checkpoint")
    z = standardize(made.items["train"].features)
    for rows in z.values():
        assert rows.square().mean().item() == pytest.approx(1)


def test_the_written_recipe_repeats_the_run_bit_for_bit(run, tmp_path):
    folder, _, made = run
    again = run_connector_recipe(load_recipe(folder / "recipe.yaml"), tmp_path, quiet=True)
    assert again.log.rows == made.log.rows
    for x, y in zip(again.model.parameters(), made.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_another_seed_gives_another_run(tmp_path):
    first, second = (
        run_connector_recipe(small_connector_recipe(steps=1, seed=s), tmp_path, quiet=True)
        .log.rows[0]["loss"]
        for s in (0, 1)
    )  # fmt: skip
    assert first != second


def test_biases_norms_and_embeddings_are_not_decayed():
    model = MoEConnector(ConnectorConfig({"image": 4, "text": 3}, 8, 4, 2))
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {
        names[id(p)]
        for group in optimizer.param_groups
        for p in group["params"]
        if group["weight_decay"] == 0.1
    }
    matrices = {"moe.experts.w1", "moe.experts.w2", "moe.router.weight"}
    for part in ("in_proj.", "pred_head.", "cl_head.", "target_proj."):
        matrices |= {n for n in names.values() if n.startswith(part) and n.endswith("weight")}
    assert decayed == matrices


@pytest.mark.parametrize("alpha,logged", [(0.0, {"cl", "mi_bound"}), (1.0, {"pred"})])
def test_a_term_of_share_0_is_not_logged(alpha, logged, tmp_path):
    recipe = small_connector_recipe(f"loss.alpha={alpha}", steps=2)
    row = run_connector_recipe(recipe, tmp_path, quiet=True).log.rows[0]
    assert {"pred", "cl", "mi_bound"} & set(row) == logged


def test_widths_must_be_those_of_the_features(tmp_path):
    recipe = small_connector_recipe("connector.dims.image=1281")
    message = "recipe.connector.dims: expected the features' {'image': 1280, 'text': 384}, got"
    with pytest.raises(ValueError, match=re.escape(message)):
        run_connector_recipe(recipe, tmp_path, quiet=True)


def test_too_few_items_are_refused():
    recipe = small_connector_recipe()
    model = MoEConnector(recipe.connector)
    items = {"image": torch.zeros(31, 1280), "text": torch.zeros(31, 384)}, torch.arange(31)
    message = "ConnectorTrainer: expected at least batch_size = 32 samples, got 31"
    with pytest.raises(ValueError, match=message):
        ConnectorTrainer(model, recipe.train, recipe.loss, recipe.directions, items)


def test_an_infinite_loss_stops_the_run(tmp_path):
    recipe = small_connector_recipe("train.lr=1.0e+30")
    with pytest.raises(FloatingPointError, match="step 1: expected a finite loss"):
        run_connector_recipe(recipe, tmp_path, quiet=True)


def test_features_of_ones_own_without_validation_items(tmp_path):
    rows = [{"id": f"{i}", "group": f"{i}", "split": "train", "text": ["words"]} for i in range(40)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    features = {"sound": torch.randn(40, 5), "text": torch.randn(40, 3)}
    save_file(features, tmp_path / "features.safetensors")
    overrides = (
        "connector.dims={sound: 5, text: 3}",
        "directions=[[sound, text]]",
        f"data.manifest={tmp_path / 'manifest.jsonl'}",
        f"data.features={tmp_path / 'features.safetensors'}",
    )
    made = run_connector_recipe(small_connector_recipe(*overrides), tmp_path / "run", quiet=True)
    assert made.steps_of == {("sound", "text"): 6}
    assert [row["step"] for row in made.log.rows] == list(range(6))  # and no evaluation
