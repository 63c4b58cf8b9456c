"""The stage in float before quantization: what it trains, what is compared with it, and how it is resumed."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qat.checkpoints.format import load_checkpoint
from qat.checkpoints.loading import build
from qat.data.loading import load_split
from qat.evaluation import evaluate, predictor
from qat.models.bnext import binary_convolutions
from qat.runs import RunDirectory
from qat.train.finetuning import finetune
from tests.helpers.cases import slow
from tests.helpers.killed_training import (
    WIDTHS,
    Ended,
    arguments,
    differences,
    outcome,
    resume,
    train,
    unfinished,
)
from tests.helpers.toy_runs import Silent, pretrain_toy, recipe

pytestmark = pytest.mark.xdist_group("float_stage")

#: Two epochs in float, the first of the classifier alone; one quantized.
STAGES = ("model.classifier=new", "schedule.float_epochs=2", "schedule.epochs=1")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain_toy(tmp_path_factory.mktemp("toy"), WIDTHS)


@pytest.fixture(scope="module")
def whole(start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Ended]:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    ended = train(arguments("finetune", out, start, *STAGES))
    assert ended.code == 0, ended.errors
    (run,) = out.iterdir()
    return run, results(run), ended


def begin(
    whole: tuple[Path, dict[str, Any], Ended], start: Path, at: int, send: int = signal.SIGKILL
) -> tuple[Path, Ended]:
    """The same run begun again in the same folder, until a signal reaches it at moment ``at``."""
    out = whole[0].parent
    for before in out.iterdir():
        if before != whole[0]:
            shutil.rmtree(before)
    ended = train(arguments("finetune", out, start, *STAGES), at, send=send)
    return unfinished(out), ended


def results(run: Path) -> dict[str, Any]:
    """All that a run and its stage in float leave."""
    return outcome(run) | {f"float/{key}": value for key, value in outcome(run / "float").items()}


def tune(
    start: Path, out: Path, *overrides: str, report: Silent | None = None
) -> tuple[RunDirectory, Silent]:
    report = report or Silent()
    fixed = (WIDTHS, "schedule.calibration_batches=2", "data.batch_size=320", "schedule.epochs=0")
    return finetune(recipe("tiny_int8", out, *fixed, *overrides, checkpoint=start), report), report


def test_quantization_is_compared_with_the_network_trained_in_float(
    whole: tuple[Path, dict[str, Any], Ended],
) -> None:
    run, _, ended = whole
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    kept = load_checkpoint(run / "float" / "best.safetensors")
    assert kept.quantization is None
    assert kept.recipe is not None
    accuracy = evaluate(predictor(build(kept)), load_split(kept.recipe.data, "test"), kept.recipe.data)
    assert summary["float"]["top1"] == accuracy.top1
    gain = summary["int8"]["top1"] - accuracy.top1
    assert f"{gain:+.2f} points against float rest" in ended.errors


class Watching(Silent):
    """Keeps the checkpoint of each epoch in float."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out, self.states = out, list[dict[str, Tensor]]()

    def epoch(self, metrics: Any) -> None:
        super().epoch(metrics)
        (last,) = self.out.glob("*/float/last.safetensors")
        self.states.append(load_checkpoint(last).state)


@pytest.mark.parametrize(("epochs", "body_moves"), [(2, [False, True]), (1, [True])])
def test_a_new_classifier_is_trained_alone_for_the_first_of_several_epochs(
    start: Path, tmp_path: Path, epochs: int, body_moves: list[bool]
) -> None:
    report = Watching(tmp_path)
    tune(start, tmp_path, "model.classifier=new", f"schedule.float_epochs={epochs}", report=report)
    before = load_checkpoint(start).state
    moved = [{key for key in before if not torch.equal(state[key], before[key])} for state in report.states]
    assert all("fc.weight" in keys for keys in moved)
    assert [any(key.startswith("feature.") for key in keys) for keys in moved] == body_moves


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_binary_weights_keep_the_checkpoints_signs(start: Path, tmp_path: Path, frozen: bool) -> None:
    options = ("model.classifier=new", "schedule.float_epochs=1", "optimizer.binary_lr=0.5")
    run, _ = tune(start, tmp_path, *options, f"schedule.freeze_binary={str(frozen).lower()}")
    signs = {
        name: convolution.weight >= 0
        for name, convolution in binary_convolutions(build(load_checkpoint(run.best))).items()
    }
    theirs = load_checkpoint(start).state
    same = [torch.equal(value, theirs[f"{name}.weight"] >= 0) for name, value in signs.items()]
    assert all(same) is frozen


def test_without_that_stage_a_new_classifier_teaches_nothing_and_is_compared_with_nothing(
    start: Path, tmp_path: Path
) -> None:
    options = ("model.classifier=new", "schedule.float_epochs=0", "schedule.epochs=1")
    run, report = tune(start, tmp_path, *options)
    assert "float" not in run.summary()
    assert not run.float_stage.path.exists()
    (off,) = (line for line in report.messages if "self-distillation" in line)
    assert "is off" in off
    assert "float_epochs 0" in off
    assert report.messages[-1].endswith(
        "no float-rest network of these classes was trained to compare it with"
    )
    assert not any("points" in line for line in report.messages if "calibrated" not in line)


def test_a_kept_classifier_can_be_trained_in_float_first_too(start: Path, tmp_path: Path) -> None:
    run, _ = tune(start, tmp_path, "schedule.float_epochs=1")
    assert (
        run.summary()["float"]["top1"]
        == json.loads(load_checkpoint(run.float_stage.best).metadata["accuracy"])["top1"]
    )


# Interrupted


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("first step", marks=pytest.mark.slow),
        "second epoch",
        slow("end of the stage"),
        slow("before quantization"),
        slow("quantized"),
    ],
)
def test_a_run_killed_in_either_stage_ends_with_the_same_bytes(
    whole: tuple[Path, dict[str, Any], Ended], start: Path, moment: str
) -> None:
    _, expected, ended = whole
    steps = [number for number, name in enumerate(ended.moments, start=1) if name == "step"]
    summaries = [number for number, name in enumerate(ended.moments, start=1) if name == "summary.json"]
    assert (len(steps), len(summaries)) == (12, 2)
    at = {
        "first step": steps[0],
        "second epoch": steps[5],
        "end of the stage": summaries[0] - 1,
        "before quantization": summaries[0] + 1,
        "quantized": steps[9],
    }[moment]
    run, killed = begin(whole, start, at)
    assert killed.code == -signal.SIGKILL
    last = train(resume(run))
    assert (last.code, "warning" in last.errors) == (0, False), last.errors
    assert differences(results(run), expected) == []


def test_sigterm_in_that_stage_names_the_run_to_resume(
    whole: tuple[Path, dict[str, Any], Ended], start: Path
) -> None:
    _, expected, ended = whole
    at = [number for number, name in enumerate(ended.moments, start=1) if name == "step"][2]
    run, stopped = begin(whole, start, at, signal.SIGTERM)
    assert stopped.code == 143
    assert f"go on with: qat finetune --resume {run}\n" in stopped.errors
    assert train(resume(run)).code == 0
    assert differences(results(run), expected) == []
