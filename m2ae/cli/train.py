"""Train a model by a recipe.

The folder gets the resolved recipe, the log, the checkpoint and, if the data have a test split, the
figures on it.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2ae.atomic_files import write_text
from m2ae.cli.connector_table import show_retrieval

if TYPE_CHECKING:
    from m2ae.training.recipe import ConnectorRecipe, Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "recipe", help="a YAML file, or a shipped recipe: emoji_tiny, emoji_connector"
    )
    parser.add_argument("--out", default="m2ae-run", help="folder for the results")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.field=value", dest="overrides",
        help="replace a value of the recipe; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the figures as JSON only")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from m2ae.training.recipe import ConnectorRecipe, load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if isinstance(recipe, ConnectorRecipe):
        _train_connector(recipe, options)
    else:
        _train_m2ae(recipe, options)
    return 0


def _train_m2ae(recipe: "Recipe", options: argparse.Namespace) -> None:
    from m2ae.evaluation.held_out import evaluate_held_out
    from m2ae.training.run import run_recipe

    made = run_recipe(recipe, options.out, quiet=options.json)
    figures = {"samples_per_second": made.samples_per_second, "last": made.log.rows[-1]}
    if made.items["test"]:
        held_out = evaluate_held_out(
            made.model, made.items["test"], made.collator, made.items["train"]
        )
        figures |= held_out.to_dict()
    text = _write(figures, options)
    if not options.json:
        print(f"{text}\nwritten to {Path(options.out).resolve()}")


def _train_connector(recipe: "ConnectorRecipe", options: argparse.Namespace) -> None:
    from m2ae.data.features import EMOJI_ENCODERS
    from m2ae.evaluation.connector import evaluate_connector
    from m2ae.training.connector_run import run_connector_recipe

    made = run_connector_recipe(recipe, options.out, quiet=options.json)
    figures: dict[str, Any] = {
        "seed": recipe.train.seed,
        "features": EMOJI_ENCODERS if recipe.data.manifest == "emoji" else recipe.data.features,
        "parameters": sum(p.numel() for p in made.model.parameters()),
        "steps": {" to ".join(direction): n for direction, n in made.steps_of.items()},
        "samples_per_second": made.samples_per_second,
        "last": made.log.rows[-1],
    }
    if len(made.items["test"]):
        found = evaluate_connector(made.model, made.standardize, made.items, recipe.directions)
        figures["retrieval"] = {
            " to ".join(direction): of_direction.to_dict()
            for direction, of_direction in found.items()
        }
    _write(figures, options)
    if not options.json:
        show_retrieval(figures)
        print(f"written to {Path(options.out).resolve()}")


def _write(figures: dict[str, Any], options: argparse.Namespace) -> str:
    """Write metrics.json, and print it if that is all that is asked for."""
    text = json.dumps(figures, indent=2)
    write_text(Path(options.out) / "metrics.json", text + "\n")
    if options.json:
        print(text)
    return text
