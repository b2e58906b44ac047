"""Recipes: what a file says is what runs; what it cannot mean is an error."""

import re

import pytest
import yaml

from m2ae.config import ConnectorConfig, ConnectorLossConfig, M2AEConfig
from m2ae.training.recipe import ConnectorRecipe, Recipe, TrainConfig, load_recipe


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_shipped_recipe_trains_the_tiny_preset():
    recipe = load_recipe("emoji_tiny")
    assert recipe.model == M2AEConfig.preset("m2ae_tiny")
    assert recipe.data.manifest == "emoji"


def test_values_beside_a_preset_replace_its_own(tmp_path):
    path = write(tmp_path, "model: {preset: m2ae_tiny, image: {depth: 1}}\ntrain: {steps: 7}")
    recipe = load_recipe(path)
    tiny = M2AEConfig.preset("m2ae_tiny")
    assert recipe.model.image.depth == 1
    assert recipe.model.image.embed_dim == tiny.image.embed_dim
    assert recipe.model.text == tiny.text
    assert recipe.train == TrainConfig(steps=7)


def test_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path, "train: {steps: 7}")
    recipe = load_recipe(path, ["train.steps=9", "train.lr=0.5", "model.loss.jepa=0.0"])
    assert (recipe.train.steps, recipe.train.lr, recipe.model.loss.jepa) == (9, 0.5, 0.0)


def test_a_written_recipe_reads_back_equal(tmp_path):
    recipe = load_recipe("emoji_tiny", ["train.seed=3"])
    path = write(tmp_path, yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    "text,error,message",
    [
        ("train: {stepz: 1}", ValueError, "'stepz'; did you mean 'steps'?"),
        ("trian: {steps: 1}", ValueError, "'trian'; did you mean 'train'?"),
        ("model: {preset: m2ae_tinny}", ValueError, "'m2ae_tinny'; did you mean 'm2ae_tiny'?"),
        ("train: {steps: many}", TypeError, "recipe.train.steps: expected int"),
        ("train: {steps: 0}", ValueError, "TrainConfig.steps: expected 1 or more, got 0"),
        ("train: {batch_size: 1}", ValueError, "TrainConfig.batch_size: expected 2 or more"),
        ("train: {final_lr: 2.0}", ValueError, "TrainConfig.final_lr: expected a share in [0, 1]"),
        ("- 1", ValueError, "expected keys and values, got [1]"),
        ("a: [", ValueError, "expected YAML"),
    ],
)
def test_mistakes_are_named(text, error, message, tmp_path):
    with pytest.raises(error, match=re.escape(message)):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("override", ["train.steps", "=1", "train..steps=1"])
def test_an_override_has_a_form(override):
    with pytest.raises(ValueError, match=re.escape("--set: expected section.field=value")):
        load_recipe("emoji_tiny", [override])


def test_an_override_of_a_value_is_no_section():
    with pytest.raises(ValueError, match=r"--set: expected a section in 'train\.steps\.x'"):
        load_recipe("emoji_tiny", ["train.steps.x=1"])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(FileNotFoundError, match="did you mean 'emoji_tiny'"):
        load_recipe("emoji_tyni")


def test_a_missing_file_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_recipe("nowhere.yaml")


def test_defaults_are_a_recipe():
    assert Recipe().model == M2AEConfig()


CONNECTOR = "connector: {dims: {image: 4, text: 3}}"


def test_a_recipe_with_a_connector_is_of_a_connector(tmp_path):
    text = f"{CONNECTOR}\nloss: {{alpha: 0.25}}\ndirections: [[text, image]]"
    recipe = load_recipe(write(tmp_path, text), ["connector.top_k=1", "train.steps=7"])
    assert recipe == ConnectorRecipe(
        ConnectorConfig({"image": 4, "text": 3}, top_k=1),
        directions=(("text", "image"),),
        loss=ConnectorLossConfig(alpha=0.25),
        train=TrainConfig(steps=7),
    )
    written = write(tmp_path, yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(written) == recipe


def test_shipped_connector_recipe_goes_both_ways():
    recipe = load_recipe("emoji_connector")
    assert isinstance(recipe, ConnectorRecipe)
    assert recipe.directions == (("image", "text"), ("text", "image"))
    assert recipe.data.manifest == "emoji"


@pytest.mark.parametrize(
    "text,error,message",
    [
        (f"{CONNECTOR}\nmodel: {{}}", ValueError, "expected one of 'model' and 'connector', got"),
        ("conector: {dims: {}}", ValueError, "'conector'; did you mean 'connector'?"),
        ("connector: {}", ValueError, "recipe.connector.dims: expected a value, got none"),
        (f"{CONNECTOR}\nloss: {{alfa: 1}}", ValueError, "'alfa'; did you mean 'alpha'?"),
        (f"{CONNECTOR}\ndata: {{augment: true}}", ValueError, "recipe.data: expected only known"),
        (f"{CONNECTOR}\ndirections: [[image, txt]]", ValueError, "got 'txt'; did you mean 'text'?"),
        (f"{CONNECTOR}\ndirections: [[image]]", ValueError, "recipe.directions[0]: expected 2 val"),
        (f"{CONNECTOR}\ndata: {{manifest: m}}", ValueError, "expected a file with a manifest of"),
        (f"{CONNECTOR}\ndata: {{features: f}}", ValueError, "and none with 'emoji', got 'f'"),
        ("model: {}\nloss: {alpha: 1}", ValueError, "recipe: expected only known keys, got 'loss'"),
    ],
)
def test_mistakes_in_a_connectors_recipe_are_named(text, error, message, tmp_path):
    with pytest.raises(error, match=re.escape(message)):
        load_recipe(write(tmp_path, text))
