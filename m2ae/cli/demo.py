"""Train a small M2AE on the shipped emoji, on the CPU, and show what it learned.

Nothing is downloaded. The folder gets the log, three pictures, the checkpoint, the figures and
report.html. One seed gives the same figures every time on one machine and number of threads.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from m2ae.atomic_files import write_text

QUICK_STEPS = 30
SHOWN = 8  # rows of the picture of reconstructions
MATRIX = 32  # rows and columns of the picture of similarities


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--out", default="m2ae-demo", help="folder for the results")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument(
        "--steps", type=int, default=None, help="of training; default: the recipe's"
    )
    parser.add_argument("--quick", action="store_true", help="half a minute instead of minutes")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON only")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from m2ae.evaluation.held_out import evaluate_held_out
    from m2ae.training.recipe import Recipe, load_recipe
    from m2ae.training.run import run_recipe

    start = time.monotonic()
    folder = Path(options.out)
    recipe = load_recipe("emoji_tiny")
    assert isinstance(recipe, Recipe)  # that file has no connector
    steps = QUICK_STEPS if options.quick and options.steps is None else options.steps
    train = replace(recipe.train, seed=options.seed, steps=steps or recipe.train.steps)
    if steps is not None:
        if steps < 1:
            raise ValueError(f"--steps: expected 1 or more, got {steps}")
        train = replace(train, warmup_steps=min(train.warmup_steps, steps // 5))
    recipe = replace(recipe, train=train)

    made = run_recipe(recipe, folder, quiet=options.json)
    held_out = evaluate_held_out(made.model, made.items["test"], made.collator, made.items["train"])
    _draw(folder, made.log.rows, held_out)
    figures = {
        "seed": train.seed,
        "steps": train.steps,
        "training_samples": len(made.items["train"]),
        **held_out.to_dict(),
        "samples_per_second": round(made.samples_per_second, 1),
        "seconds": round(time.monotonic() - start, 1),
    }
    write_text(folder / "metrics.json", json.dumps(figures, indent=2) + "\n")
    tables = _tables(figures)
    _report(folder, figures, tables)
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        _show(figures, tables, folder)
    return 0


def _draw(folder: Path, rows: list[dict[str, Any]], held_out: Any) -> None:
    from m2ae.viz.curves import loss_curves
    from m2ae.viz.reconstruction import reconstruction_grid
    from m2ae.viz.similarity import similarity_matrix

    loss_curves(rows, folder / "losses.png")
    # Spread over the test split, whose order is that of the emoji's categories.
    every = max(1, len(held_out.captions) // SHOWN)
    shown = slice(every // 2, None, every)
    columns = {"original": held_out.images} | {
        f"from {name}": images for name, images in held_out.reconstructions.items()
    }
    reconstruction_grid(
        {name: images[shown][:SHOWN] for name, images in columns.items()},
        held_out.captions[shown][:SHOWN],
        folder / "reconstructions.png",
    )
    every = max(1, len(held_out.captions) // MATRIX)
    chosen = slice(0, every * MATRIX, every)
    labels = [caption.rsplit(":", 1)[0] for caption in held_out.captions[chosen]]
    similarity_matrix(
        held_out.similarities[chosen, chosen],
        folder / "similarities.png",
        row_labels=labels,
        column_labels=labels,
        title="Cosine of held-out images (rows) and captions (columns)",
    )


def _tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows): retrieval and reconstruction, as they are printed and reported."""
    rows = []
    for direction, metrics in figures["retrieval"].items():
        for name in ("R@1", "R@10"):
            recall = metrics[name]
            low, high = recall["interval"]
            rows.append(
                [
                    direction,
                    name,
                    f"{recall['percent']:.1f} %",
                    f"{low:.1f} to {high:.1f}",
                    f"{recall['chance']:.1f} %",
                    f"{recall['category_only']:.1f} %",
                ]
            )
    columns = ["direction", "recall", "M2AE", "95 % interval", "chance", "category only"]
    retrieval = ("Retrieval among held-out emoji", columns, rows)
    psnr = [
        [name if name == "mean image" else f"from {name}", f"{value:.2f} dB"]
        for name, value in figures["psnr_db"].items()
    ]
    return [retrieval, ("Reconstruction of held-out images", ["image", "PSNR"], psnr)]


NOTES = (
    "Every one of the test split's {n} images is compared with every caption; no emoji, in any"
    " variant, is in two splits. Category only: knowing each emoji's subgroup (such as 'face-hand')"
    " perfectly and nothing else.",
    "Mean over images. From text: the image decoder sees the caption only. Mean image: always the"
    " average training image.",
)


def _report(folder: Path, figures: dict[str, Any], tables: list[Any]) -> None:
    import torch

    import m2ae
    from m2ae.viz.report import Table, write_report

    n = figures["retrieval"]["image to text"]["protocol"]
    notes = [note.format(n=n.split(", ")[1].split()[0]) for note in NOTES]
    write_report(
        folder,
        title="M2AE on 1,899 emoji",
        facts={
            "data": f"{figures['training_samples']:,} training samples, protocol {n}",
            "run": f"{figures['steps']} steps, seed {figures['seed']}",
            "speed": f"{figures['samples_per_second']} samples per second,"
            f" {figures['seconds']} s in all",
            "versions": f"m2ae {m2ae.__version__}, torch {torch.__version__},"
            f" {torch.get_num_threads()} threads",
        },
        tables=[
            Table(title, columns, rows, note)
            for (title, columns, rows), note in zip(tables, notes, strict=True)
        ],
        figures=[
            ("losses.png", "The terms of the objective over the steps."),
            ("reconstructions.png", "Held-out images, and what is decoded from their latents."),
            ("similarities.png", "Pairs that belong together are on the diagonal."),
        ],
    )


def _show(figures: dict[str, Any], tables: list[Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, columns, rows in tables:
        table = Table(title=title, title_justify="left")
        for column in columns:
            numeric = column not in ("direction", "recall", "image")
            table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(
        f"{figures['steps']} steps at {figures['samples_per_second']} samples per second,"
        f" {figures['seconds']} s in all, seed {figures['seed']}"
    )
    console.print(f"report: {(folder / 'report.html').resolve()}", soft_wrap=True, highlight=False)
