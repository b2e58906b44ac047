"""Train a model by a recipe.

The folder gets the resolved recipe, the log, the checkpoint and, if the data have a test split, the
figures on it.
"""

import argparse
import json
from pathlib import Path

from m2ae.atomic_files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("recipe", help="a YAML file, or a shipped recipe such as emoji_tiny")
    parser.add_argument("--out", default="m2ae-run", help="folder for the results")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.field=value", dest="overrides",
        help="replace a value of the recipe; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the figures as JSON only")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from m2ae.evaluation.held_out import evaluate_held_out
    from m2ae.training.recipe import load_recipe
    from m2ae.training.run import run_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    made = run_recipe(recipe, options.out, quiet=options.json)
    figures = {"samples_per_second": made.samples_per_second, "last": made.log.rows[-1]}
    if made.items["test"]:
        held_out = evaluate_held_out(
            made.model, made.items["test"], made.collator, made.items["train"]
        )
        figures |= held_out.to_dict()
    text = json.dumps(figures, indent=2)
    write_text(Path(options.out) / "metrics.json", text + "\n")
    print(text if options.json else f"{text}\nwritten to {Path(options.out).resolve()}")
    return 0
