"""`m2ae train emoji_connector`: what it prints and writes."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from small_connector_recipe import CONNECTOR_OVERRIDES

from m2ae.cli.connector_table import show_retrieval, table_rows
from m2ae.cli.main import main
from m2ae.models.connector import MoEConnector

METHODS = ("prediction", "contrastive", "ridge", "ridge_shuffled_in_category", "chance")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(standard output, folder) of two steps, on a terminal of 80 columns."""
    folder = tmp_path_factory.mktemp("trained") / "m2ae-run"
    options = [part for o in (*CONNECTOR_OVERRIDES, "train.steps=2") for part in ("--set", o)]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("COLUMNS", "80")
        assert main(["train", "emoji_connector", "--out", str(folder), *options]) == 0
    return out.getvalue(), folder


def test_figures_are_written(trained):
    _, folder = trained
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["steps"] == {"image to text": 1, "text to image": 1}
    assert "ImageNet labels" in figures["features"]
    model = MoEConnector.from_pretrained(folder / "checkpoint")
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    for direction in ("image to text", "text to image"):
        methods = figures["retrieval"][direction]
        assert methods["protocol"] == "1:1, 449 queries, 449 keys"
        assert set(METHODS) < set(methods)
        # Closed forms on shipped features: 42 to 49, 30 to 36 and 2.2 %, whatever was trained.
        ridge, shuffled = methods["ridge"]["R@10"]["percent"], methods[METHODS[3]]["R@10"]
        assert ridge > shuffled + 5 > methods["chance"]["R@10"] + 20


def test_the_table_fits_into_80_columns(trained):
    out, folder = trained
    *lines, last = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out
    table = [line for line in lines if line.startswith("│")]
    assert len(table) == 4
    retrieval = json.loads((folder / "metrics.json").read_text())["retrieval"]
    ridge = retrieval["image to text"]["ridge"]["R@10"]["percent"]
    cells = [cell.strip() for cell in table[1].strip("│").split("│")]
    assert (cells[1], cells[4]) == ("R@10", f"{ridge:.1f}")
    assert last == f"written to {folder.resolve()}"


def test_the_example_of_the_docs_finds_what_the_figures_say(trained, monkeypatch):
    _, folder = trained
    monkeypatch.chdir(folder.parent)
    page = Path(__file__).parents[2] / "docs/connector.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    names = {}
    exec(example, names)
    figures = json.loads((folder / "metrics.json").read_text())["retrieval"]["image to text"]
    for scores, head in (("by_contrast", "contrastive"), ("by_prediction", "prediction")):
        scores = names[scores]
        rank = (scores >= scores.diagonal()[:, None]).sum(1)
        # The figures' scores are rounded from float64: some pair may change places.
        wanted = pytest.approx(figures[head]["R@10"]["percent"], abs=100 * 2 / 449)
        assert 100 * (rank <= 10).float().mean().item() == wanted


def test_info_counts_the_connector_of_a_checkpoint(trained, capsys):
    _, folder = trained
    checkpoint = folder / "checkpoint"
    assert main(["info", str(checkpoint), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = MoEConnector.from_pretrained(checkpoint)
    *parts, total = facts["parameters"].values()
    assert sum(parts) == total == sum(p.numel() for p in model.parameters())
    assert facts["parameters"]["moe.router"] == 4 * 16 + 4
    assert facts["experts"]["per token"] == "2 of 4"
    assert facts["shapes"]["text prediction"] == "(B, 384)"


def test_json_is_all_that_is_printed_if_asked_for(tmp_path, capsys, monkeypatch):
    # The figures themselves are tested above, and take seconds.
    monkeypatch.setattr("m2ae.evaluation.connector.evaluate_connector", lambda *_: {})
    options = [part for o in (*CONNECTOR_OVERRIDES, "train.steps=1") for part in ("--set", o)]
    status = main(["train", "emoji_connector", "--json", "--out", str(tmp_path), *options])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    assert json.loads(printed.out) == json.loads((tmp_path / "metrics.json").read_text())


def test_what_was_not_computed_is_a_dash_and_no_test_items_no_table(capsys):
    recall = {"percent": 12.34, "interval": [1, 20]}
    heads = {name: {"R@1": recall, "R@10": recall} for name in METHODS[:2]}
    methods = heads | {METHODS[3]: None, "chance": {"R@1": 1.0, "R@10": 10.0}}
    rows = table_rows({"a to b": methods})
    assert rows == [
        (False, ["a to b", "R@1", "12.3", "12.3", "-", "-", "1.0"]),
        (True, ["", "R@10", "12.3", "12.3", "-", "-", "10.0"]),
    ]
    facts = {"parameters": 5, "steps": {"a to b": 2}, "samples_per_second": 1.0, "seed": 0}
    show_retrieval(facts)
    assert capsys.readouterr().out.startswith("5 parameters; steps: 2 a to b; 1 samples per second")
