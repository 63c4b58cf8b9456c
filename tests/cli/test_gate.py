"""qat gate: recording, each verdict and its exit code, and what CI is given."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat.checkpoints.format import load_checkpoint, save_checkpoint
from qat.checkpoints.loading import build
from qat.cli.group import main
from qat.commands import gate as gate_command
from qat.commands.opening import Opened
from qat.data.loading import load_split
from qat.gate.baseline import describe_data, pack, percentage
from qat.gate.baseline_file import read_baseline, write_baseline
from qat.recipe.loading import load_recipe
from tests.helpers.paths import ROOT
from tests.helpers.toy_runs import fail, pretrain_toy, qat, settings, succeed, tuned

Changed = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_job_and_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.delenv("GITHUB_OUTPUT", raising=False)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def recorded(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The baseline of the run in the fixture ``toys``. To be read only."""
    path = tmp_path_factory.mktemp("baseline") / "b.json"
    succeed("gate", "record", tuned(toys).parent, "-o", path)
    return path


@pytest.fixture
def changed(recorded: Path, tmp_path: Path) -> Changed:
    """Write a baseline of another model: of the recorded one's answers, so many more are right or wrong."""

    def write(lost: int = 0, gained: int = 0, **changes: Any) -> Path:
        one = read_baseline(recorded)
        bits = one.answers()
        right, wrong = np.flatnonzero(bits), np.flatnonzero(~bits)
        bits[wrong[:lost]] = True
        bits[right[:gained]] = False
        top1 = percentage(int(bits.sum()), one.images)
        other = one.model.model_copy(update={"sha256": "e" * 64})
        update = {"correct": pack(bits), "top1": top1, "top5": 100.0, "model": other} | changes
        write_baseline(tmp_path / "changed.json", one.model_copy(update=update))
        return tmp_path / "changed.json"

    return write


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A toy that learned something, but with the classes of its classifier in another order; its baseline."""
    folder = tmp_path_factory.mktemp("damaged")
    good = pretrain_toy(folder / "runs", "schedule.epochs=5")
    succeed("gate", "record", good, "-o", folder / "b.json")
    stored = load_checkpoint(good)
    model = build(stored)
    with torch.no_grad():
        model.fc.weight.copy_(model.fc.weight.roll(1, 0))
    save_checkpoint(folder / "d.safetensors", model, recipe=stored.recipe)
    return folder / "d.safetensors", folder / "b.json"


def gated(*arguments: object) -> dict[str, Any]:
    return json.loads(succeed("gate", *arguments, "--json"))


def without_date(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith('  "recorded": ')]


# Recording


def test_a_recording_says_what_an_evaluation_says_and_twice_says_the_same(
    toys: Path, recorded: Path, tmp_path: Path
) -> None:
    accuracy = json.loads(succeed("evaluate", tuned(toys), "--json"))
    found = read_baseline(recorded)
    assert (found.images, found.top1) == (360, percentage(found.correct_count, 360))
    assert (found.top1, found.top5) == (
        pytest.approx(accuracy["top1"], abs=1e-4),
        pytest.approx(accuracy["top5"], abs=1e-4),
    )
    assert found.model.file == "best.safetensors"
    assert recorded.stat().st_size < 8000
    path = tmp_path / "new" / "b.json"
    path.parent.mkdir()
    for _ in range(2):  # a new file, then over itself
        text = succeed("gate", "record", tuned(toys), "-o", path)
        assert text.startswith(f"{path}: top-1 {found.top1:.2f}%  top-5 {found.top5:.2f}%  of 360 images, ")
        assert without_date(path) == without_date(recorded)
    assert str(toys) not in path.read_text(encoding="utf-8")


def test_an_exported_model_has_the_answers_of_its_run(toys: Path, recorded: Path, tmp_path: Path) -> None:
    run = read_baseline(recorded)
    succeed("gate", "record", toys / "model.onnx", "-o", tmp_path / "b.json")
    model = read_baseline(tmp_path / "b.json")
    assert (model.correct, model.top1, model.top5) == (run.correct, run.top1, run.top5)
    assert (model.data, model.recipe, model.class_names) == (run.data, run.recipe, run.class_names)
    assert (model.model.file, model.model.format) == ("model.onnx", "bnext-qat portable 1")
    assert model.model.architecture == run.model.architecture
    found = gated(toys / "model.onnx", "--baseline", recorded, "--max-drop", 3)
    assert (found["verdict"], found["lost"], found["gained"]) == ("pass", 0, 0)


def test_other_exports_and_a_float_checkpoint_can_be_gated_too(
    toys: Path, recorded: Path, tmp_path: Path
) -> None:
    succeed("export", "--onnx", tmp_path / "s.onnx", "--checkpoint", tuned(toys), "--strict-onnx")
    succeed("export", "--onnx", tmp_path / "f.onnx", "--checkpoint", tuned(toys), "--float32")
    assert gated(tmp_path / "s.onnx", "--baseline", recorded, "--max-drop", 99)["lost"] == 0
    succeed("gate", "record", tmp_path / "f.onnx", "-o", tmp_path / "f.json")
    for path in (tmp_path / "f.onnx", toys / "float.safetensors"):
        assert gated(path, "--baseline", tmp_path / "f.json", "--max-drop", 99)["passes"]


@pytest.mark.parametrize("name", ["m.onnx", "recipe.yaml", "other.json"])
def test_a_file_that_is_no_baseline_is_not_overwritten(toys: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = {"m.onnx": (toys / "model.onnx").read_bytes(), "recipe.yaml": b"a: 1\n", "other.json": b"{}"}
    path.write_bytes(content[name])
    message = fail(2, "gate", "record", tuned(toys), "-o", path)
    assert f"error: {path}: not a baseline" in message
    assert "it is not overwritten: delete it, or name another file" in message
    assert path.read_bytes() == content[name]


# Verdicts


def test_a_recorded_model_passes_with_the_same_file(toys: Path, recorded: Path) -> None:
    run = tuned(toys).parent
    lines = succeed("gate", run, "--baseline", recorded).splitlines()
    assert lines[-1] == f"{run}: pass: the same file as the baseline's, with the same answers"
    assert max(map(len, lines[2:-1])) <= 80
    assert any(line.split() == ["images", "360"] for line in lines)
    assert gated(tuned(toys), "--baseline", recorded)["verdict"] == "pass"


def test_a_damaged_model_fails_with_1_a_table_and_the_verdict_last(
    damaged: tuple[Path, Path], tmp_path: Path
) -> None:
    result = qat("gate", damaged[0], "--baseline", damaged[1], "--junit", tmp_path / "j.xml")
    assert result.exit_code == 1
    assert "images that only the baseline has right" in result.stdout
    assert "fail: " not in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: fail: top-1 fell by ")
    assert line.endswith(", and 1 is allowed")
    suite = ET.parse(tmp_path / "j.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")


def test_a_better_model_is_improved_and_says_how_to_record_it(toys: Path, changed: Changed) -> None:
    gained = 30
    path = changed(gained=gained)
    options = ["--recipe", "tiny_int8", *settings(["data.image_size=8"])]
    result = qat("gate", tuned(toys), "--baseline", path, *options)
    assert result.exit_code == 0
    command, last = result.stdout.splitlines()[-2:]
    assert last.startswith(f"{tuned(toys)}: improved: top-1 rose by {gained / 3.6:.2f} points")
    assert command == (
        f"record it as the new baseline: qat gate record {tuned(toys)} -o {path} --recipe tiny_int8 "
        "--set data.image_size=8"
    )


def test_too_few_images_pass_with_a_warning_or_fail_as_asked(toys: Path, changed: Changed) -> None:
    arguments = ("gate", tuned(toys), "--baseline", changed(lost=3, gained=2))
    result = qat(*arguments)
    assert result.exit_code == 0
    assert result.stderr == (
        "warning: inconclusive, measured drop within what is allowed: it passes, as --on-inconclusive "
        "measured says; a larger drop may have gone unseen\n"
    )
    last = result.stdout.splitlines()[-1]
    within = "inconclusive, measured drop within what is allowed: top-1 fell by 0.28 points"
    assert last.startswith(
        f"{tuned(toys)}: {within} (5 of 360 images changed sides: 3 became wrong, 2 right)"
    )
    assert " images could, if the model is as good as the baseline" in last
    message = fail(1, *arguments, "--on-inconclusive", "fail")
    assert message.startswith(f"error: {within}")


def test_a_measured_drop_above_the_limit_fails_unless_chance_is_asked_to_be_excluded(
    toys: Path, changed: Changed
) -> None:
    arguments = ("gate", tuned(toys), "--baseline", changed(lost=5))
    assert fail(1, *arguments).startswith(
        "error: inconclusive, measured drop above what is allowed: top-1 fell by 1.39 points (5 of 360 images"
    )
    result = qat(*arguments, "--on-inconclusive", "pass")
    assert result.exit_code == 0
    assert result.stderr.startswith(
        "warning: inconclusive, measured drop above what is allowed: it passes, as "
    )
    assert result.stderr.endswith("; the drop may be real\n")
    assert qat(*arguments, "--max-drop", 1.4).exit_code == 0
    text = fail(1, *arguments, "--max-relative-drop", 0.2)
    assert " (0.2 % of the baseline's " in text


def test_equal_answers_of_another_file_pass_without_a_warning(toys: Path, changed: Changed) -> None:
    result = qat("gate", tuned(toys), "--baseline", changed(), "--max-drop", 0, "--on-inconclusive", "fail")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "pass: the same images are right as the baseline's: 0 of 360 changed sides" in result.stdout


def test_images_that_changed_sides_are_listed_with_their_direction(toys: Path, changed: Changed) -> None:
    path = changed(lost=2, gained=1)
    arguments = ("gate", tuned(toys), "--baseline", path, "--max-drop", 5, "--show-flips")
    lines = qat(*arguments).stdout.splitlines()
    start = lines.index("images that changed sides: 2 right → wrong, 1 wrong → right")
    assert [line.split(":")[0] for line in lines[start + 1 : start + 4]] == ["right → wrong"] * 2 + [
        "wrong → right"
    ]
    flips = gated(*arguments[1:])["flips"]
    assert (flips["became_wrong"], flips["became_right"], len(flips["images"])) == (2, 1, 3)
    before, labels = (
        read_baseline(path).answers(),
        load_split(load_recipe("tiny_int8").recipe.data, "test").labels,
    )
    for one in flips["images"]:
        assert one["image"] is None
        assert before[one["index"]] == (one["became"] == "wrong")
        assert one["true_class"] == str(int(labels[one["index"]]))
        assert one["baseline_answer"] == (one["true_class"] if one["became"] == "wrong" else None)
        assert (one["answer"] == one["true_class"]) is (one["became"] == "right")
    assert gated(*arguments[1:-1])["flips"] is None


def test_a_broken_floor_fails_the_same_file_and_a_kept_one_does_not(toys: Path, recorded: Path) -> None:
    arguments = ("gate", tuned(toys), "--baseline", recorded, "--floor")
    top1 = read_baseline(recorded).top1
    assert fail(1, *arguments, 100).startswith(
        f"error: fail: top-1 is {top1:.2f} %, below the floor of 100 %"
    )
    assert "the same file" in succeed(*arguments, top1 - 0.01)


def test_json_is_one_object_also_where_the_gate_fails(damaged: tuple[Path, Path]) -> None:
    result = qat("gate", damaged[0], "--baseline", damaged[1], "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["verdict"], found["passes"]) == ("fail", False)
    assert found["change_at_most"] < -1
    assert found["lost"] > found["gained"]
    assert found["model"]["file"] == "d.safetensors"
    assert result.stderr == f"error: fail: {found['reason']}\n"


def test_another_processor_is_a_warning_everywhere(
    toys: Path, recorded: Path, changed: Changed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = read_baseline(recorded).processor.model_copy(update={"name": "Abacus"})
    path = changed(processor=processor)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "s.md"))
    junit = tmp_path / "j.xml"
    result = qat("gate", tuned(toys), "--baseline", path, "--max-drop", 5, "--junit", junit)
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: another processor: ")
    assert "; the baseline is of Abacus (" in line
    assert line in (ET.parse(junit).getroot().findtext(".//system-out") or "").splitlines()
    assert "- Warning: another processor: " in (tmp_path / "s.md").read_text(encoding="utf-8")
    result = qat("gate", tuned(toys), "--baseline", path, "--max-drop", 5, "--json")
    assert json.loads(result.stdout)["warnings"] == [line.removeprefix("warning: ")]


def test_what_opening_the_model_warns_of_is_among_the_warnings(toys: Path, recorded: Path) -> None:
    options = ["--recipe", "tiny_int8", *settings(["data.image_size=8"])]
    result = qat("gate", toys / "float.safetensors", "--baseline", recorded, *options, "--json")
    (text,) = json.loads(result.stdout)["warnings"]
    assert "model: describes BNext tiny" in text
    assert f"warning: {text}" in result.stderr


def test_answers_that_are_no_numbers_count_as_wrong_and_are_told(
    toys: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = gate_command.open_model(tuned(toys), None, (), pytest.fail)

    def opened(*_: object) -> Opened:
        def predict(images: torch.Tensor) -> torch.Tensor:
            logits = good.predict(images)
            logits[:, 3] = torch.nan
            return logits

        return Opened(**(vars(good) | {"predict": predict}))

    monkeypatch.setattr(gate_command, "open_model", opened)
    result = qat("gate", tuned(toys), "--baseline", recorded)
    assert result.exit_code == 1
    assert "logits of 360 of 360 images are NaN; they count as wrong" in result.stderr
    assert "top-1, this model" in result.stdout
    assert " 0.00 %" in result.stdout


# The baseline of the repository


def test_the_packaged_network_keeps_the_recorded_baseline_of_the_default_recipe() -> None:
    path = ROOT / "tests" / "baselines" / "tiny_int8_digits.json"
    data = load_recipe("tiny_int8").recipe.data
    assert read_baseline(path).data == describe_data(load_split(data, "test"), data)
    packaged = ROOT / "recipes" / "checkpoints" / "bnext_tiny_digits.safetensors"
    result = qat("gate", packaged, "--baseline", path, "--recipe", "tiny_int8", "--max-drop", 3, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["verdict"], found["images"]) == (0, "pass", 360)
    assert found["top1"] > 98.5


# How it is called


def test_a_model_named_record_is_reached_by_its_path(
    toys: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "record").symlink_to(tuned(toys).parent)
    monkeypatch.chdir(tmp_path)
    assert gated("./record", "--baseline", recorded)["verdict"] == "pass"
    assert gated("--baseline", recorded, "record")["verdict"] == "pass"


def test_help_shows_both_usages_and_fits_eighty_columns() -> None:
    text, record = succeed("gate", "--help"), succeed("gate", "record", "--help")
    assert text.startswith(
        "Usage: qat gate [OPTIONS] MODEL --baseline FILE\n       qat gate record [OPTIONS] "
    )
    assert record.startswith("Usage: qat gate record [OPTIONS] MODEL\n")
    for one in (text, record):
        assert max(map(len, one.splitlines())) <= 80
    for word in ("--max-drop", "--confidence", "--floor", "--on-inconclusive", "--recipe", "--set", "--json"):
        assert word in text, word
    for word in (
        "--junit",
        "GITHUB_STEP_SUMMARY",
        "Exit codes",
        "record  Write the baseline of MODEL to FILE.",
    ):
        assert word in text, word
    assert "gate" in main.commands
    result = qat("gate", "nowhere", "--baseline", "nowhere", "--debug")
    assert "Traceback (most recent call last)" in result.stderr
