"""The loop: it learns, it repeats itself, it stops where it must."""

import dataclasses
import json

import pytest
import torch
from small_recipe import small_recipe

from m2ae.config import M2AEConfig
from m2ae.dataclass_io import from_dict, to_dict
from m2ae.models.m2ae import M2AE
from m2ae.training.log import RunLog
from m2ae.training.optim import make_optimizer
from m2ae.training.recipe import Recipe, TrainConfig, load_recipe
from m2ae.training.run import load_items, run_recipe
from m2ae.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run_recipe(small_recipe(steps=40, lr=3e-3), folder, quiet=True)


def test_every_term_falls(run):
    _, made = run
    rows = [row for row in made.log.rows if "loss" in row]
    for term in ("loss", "recon_image", "recon_text", "jepa"):
        first, last = (sum(row[term] for row in part) / 5 for part in (rows[:5], rows[-5:]))
        assert last < first, term


def test_validation_terms_are_logged(run):
    _, made = run
    rows = [row for row in made.log.rows if "val_loss" in row]
    assert [row["step"] for row in rows] == [*range(2, 40, 3), 39]
    assert {"val_recon_image", "val_recon_text", "val_jepa", "val_align"} <= set(rows[0])


def test_the_file_holds_every_row(run):
    folder, made = run
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == made.log.rows


def test_the_checkpoint_is_the_model(run):
    folder, made = run
    loaded = M2AE.from_pretrained(folder / "checkpoint")
    for (name, x), (_, y) in zip(
        made.model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(x, y), name


def test_the_written_recipe_repeats_the_run_bit_for_bit(run, tmp_path):
    folder, made = run
    again = run_recipe(load_recipe(folder / "recipe.yaml"), tmp_path, quiet=True)
    assert again.log.rows == made.log.rows
    for x, y in zip(again.model.parameters(), made.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_another_seed_gives_another_run(tmp_path):
    first, second = (
        run_recipe(small_recipe(steps=1, seed=seed), tmp_path, quiet=True).log.rows[0]["loss"]
        for seed in (0, 1)
    )
    assert first != second


def test_target_encoder_is_not_optimized_and_follows():
    config = from_dict(M2AEConfig, to_dict(small_recipe().model))
    model = M2AE(config)
    optimizer = make_optimizer(model, TrainConfig())
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in model.target_encoder.parameters()}
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}


def test_only_matrices_are_decayed():
    model = M2AE(small_recipe().model)
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert decay["fusion.weight"] == 0.1
    assert decay["fusion.bias"] == 0.0
    assert decay["image_encoder.positions"] == 0.0
    assert decay["text_encoder.table.weight"] == 0.0


def test_too_few_samples_are_refused():
    recipe = small_recipe()
    model = M2AE(recipe.model)
    with pytest.raises(ValueError, match="expected at least batch_size = 16 samples, got 0"):
        Trainer(model, recipe.train, [], None)


def test_an_infinite_loss_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "m2ae.models.m2ae.image_reconstruction_loss",
        lambda decoded, target, present: decoded.sum() * float("inf"),
    )
    with pytest.raises(FloatingPointError, match="step 0: expected a finite loss"):
        run_recipe(small_recipe(), tmp_path, quiet=True)


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path):
    recipe = small_recipe()
    text = dataclasses.replace(recipe.model.text, vocab_size=100)
    recipe = Recipe(dataclasses.replace(recipe.model, text=text), recipe.data, recipe.train)
    with pytest.raises(ValueError, match="expected at least the tokenizer's 2048, got 100"):
        run_recipe(recipe, tmp_path, quiet=True)


def test_shortened_captions_are_counted_and_told(tmp_path):
    recipe = small_recipe(steps=2)
    text = dataclasses.replace(recipe.model.text, context_length=3)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, text=text))
    with pytest.warns(UserWarning, match="captions lost tokens: .* context_length = 3"):
        made = run_recipe(recipe, tmp_path, quiet=True)
    assert made.log.rows[0]["shortened"] > 0


def test_plain_lines_tell_the_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("m2ae.training.log.PLAIN_EVERY", 0.0)
    with RunLog(tmp_path / "log.jsonl", 2) as log:
        log.advance(0, {"loss": 1.5})
        log.advance(1, {"loss": 1.25})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 1/2  loss 1.5  ")
    assert lines[1].startswith("step 2/2  loss 1.25  0 s left")


def test_an_own_manifest_is_loaded(tmp_path):
    row = {"id": "a", "group": "a", "split": "train", "text": ["a word"]}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    recipe = load_recipe("emoji_tiny", [f"data.manifest={tmp_path / 'manifest.jsonl'}"])
    (item,) = load_items(recipe.data, "train")
    assert (item.id, item.image, item.text) == ("a", None, ("a word",))
    assert load_items(recipe.data, "test") == []
