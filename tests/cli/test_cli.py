"""The command line: what it prints and writes, and how it refuses."""

import json
import os
import sys

import pytest
from small_recipe import OVERRIDES

from m2ae.cli.main import main


def run(capsys, *arguments):
    """(status, standard output, standard error)."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


@pytest.mark.slow
def test_demo_writes_everything_and_repeats_itself(tmp_path, capsys):
    figures = []
    for name in ("first", "second"):
        folder = tmp_path / name
        status, out, _ = run(capsys, "demo", "--steps", 2, "--seed", 5, "--json", "--out", folder)
        assert status == 0
        figures.append(json.loads(out))
        assert json.loads((folder / "metrics.json").read_text()) == figures[-1]
        for file in ("losses.png", "reconstructions.png", "similarities.png"):
            assert (folder / file).read_bytes().startswith(b"\x89PNG")
        page = (folder / "report.html").read_text()
        assert page.count("data:image/png;base64,") == 3
        assert "chance" in page
        assert (folder / "checkpoint/model.safetensors").exists()
    for timing in ("samples_per_second", "seconds"):
        for run_figures in figures:
            assert run_figures.pop(timing) > 0
    assert figures[0] == figures[1]
    assert figures[0]["seed"] == 5
    recall = figures[0]["retrieval"]["image to text"]["R@10"]
    assert {"percent", "chance", "category_only", "interval"} == set(recall)


def test_train_runs_a_recipe_with_overrides(tmp_path, capsys):
    overrides = [part for o in (*OVERRIDES, "train.steps=2") for part in ("--set", o)]
    status, out, _ = run(capsys, "train", "emoji_tiny", "--json", "--out", tmp_path, *overrides)
    assert status == 0
    figures = json.loads(out)
    assert figures["retrieval"]["text to image"]["protocol"].startswith("1:1, 449 queries")
    assert json.loads((tmp_path / "metrics.json").read_text()) == figures
    assert "steps: 2" in (tmp_path / "recipe.yaml").read_text()


def test_info_prints_the_golden_numbers(capsys):
    status, out, _ = run(capsys, "info", "m2ae_spec")
    assert status == 0
    for number in (
        "590,592",
        "131,328",
        "524,800",
        "1,134,339",
        "282,624",
        "294.0 : 1",
        "77.0 : 1",
    ):
        assert number in out, number
    status, out, _ = run(capsys, "info", "m2ae_spec", "--json")
    assert json.loads(out)["parameters"]["fusion"] == 524800


def test_doctor_finds_this_installation_well(capsys):
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 0
    facts = json.loads(out)
    assert facts["kernels"]["ema_update_ cpu"].startswith("csrc/cpu/ema_update.cpp")
    assert facts["checks"]["one seed, one result"].startswith("ok")
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "compiled CPU kernels" in out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["dmeo"], "expected a command, got 'dmeo'; did you mean 'demo'?"),
        ([], "the following arguments are required: command"),
        (["info", "m2ae_bass"], "got 'm2ae_bass'; did you mean 'm2ae_base'?"),
        (["train", "emoji_tinny"], "got 'emoji_tinny'; did you mean 'emoji_tiny'?"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "emoji_tiny", "--set", "train.stepz=1"], "did you mean 'steps'?"),
        (["train", "emoji_tiny", "--set", "data.manifest=nowhere.jsonl"], "nowhere.jsonl"),
        (["demo", "--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["demo", "--steps", "many"], "invalid int value: 'many'"),
        (["demo", "--seed", "-1"], "TrainConfig.seed: expected 0 <= seed < 2**32, got -1"),
    ],
)
def test_mistakes_get_one_clear_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, error = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert message in error
    assert "Traceback" not in error


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("in the way")
    status, _, error = run(capsys, "demo", "--out", file / "folder")
    assert status == 2
    assert str(file) in error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told(tmp_path, capsys):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    status, _, error = run(capsys, "demo", "--steps", 2, "--json", "--out", tmp_path)
    assert status == 2
    assert "No space left on device" in error


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(options):
        raise ValueError("list index out of range")

    monkeypatch.setattr("m2ae.cli.info.run", broken)
    with pytest.raises(ValueError, match="list index"):
        main(["info"])


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("m2ae.cli.info.run", interrupted)
    status, _, error = run(capsys, "info")
    assert (status, error) == (130, "m2ae info: interrupted\n")


def test_python_m_is_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["m2ae", "--version"])
    status, out, _ = run(capsys, "--version")
    assert status == 0
    assert out.startswith("m2ae ")
