"""Experiment trackers: what is sent, where files lie, and that resumed runs continue their curves."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qat.errors import RecipeError
from qat.recipe.schema import Tracking
from qat.train.trackers import check_trackers
from tests.helpers.joined_processes import LONG, arguments, call, codes, rows, send, the_run, together
from tests.helpers.toy_runs import fail, qat

BOARD = ("tracking.trackers=[tensorboard]", "tracking.every=2", *LONG)


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each point of each curve, as TensorBoard shows them."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tracking" / "bnext-qat"))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_steps_and_epochs_are_points_on_one_axis_and_the_recipe_is_kept(tmp_path: Path) -> None:
    assert qat(*arguments("pretrain", tmp_path, *BOARD)).exit_code == 0
    run = the_run(tmp_path)
    found = points(run)
    assert [step for step, _ in found["train/loss"]] == [2, 4, 6, 8]
    assert set(found) >= {"train/top1", "train/learning_rate", "train/images_per_second", "test/loss"}
    expected = [(4 * row["epoch"], pytest.approx(row["test_top1"])) for row in rows(run)]
    assert found["test/top1"] == expected
    # The last step of an epoch has the epoch's means.
    assert dict(found["train/loss"])[8] == pytest.approx(rows(run)[1]["loss"])
    (kept,) = run.glob("tracking/bnext-qat/*/hparams.yml")
    assert "optimizer.lr: 0.002" in kept.read_text("utf-8")
    # Nothing but the trackers' folder is added to the run.
    assert {path.name for path in run.iterdir()} == {
        "best.safetensors", "last.safetensors", "metrics.jsonl", "recipe.yaml", "summary.json", "tracking"
    }  # fmt: skip


def test_a_run_that_goes_on_continues_the_curves_without_double_points(tmp_path: Path) -> None:
    """A run that was killed after step 8 of 8 is resumed from the state after step 6, or after an epoch."""
    words = arguments("pretrain", tmp_path, *BOARD)
    ended = together(words, partial(send, 9, 0, 8), size=2)
    assert ended[0].code == -9
    run = the_run(tmp_path)
    before = points(run)["train/loss"]
    assert codes(together(["pretrain", "--resume", str(run)])) == [0, 0]
    after = points(run)
    for tag, curve in after.items():
        steps = [step for step, _ in curve]
        assert len(steps) == len(set(steps)), tag
    assert [step for step, _ in after["train/loss"]] == [2, 4, 6, 8]
    assert after["train/loss"][: len(before)] == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", r"found 'tensorbord', allowed: aim, .*\(did you mean 'tensorboard'\?\)"),
        ("wandb", r"'wandb' is not installed here; install it with: pip install 'wandb'"),
        ("tensorboard", r"'tensorboard' is not installed here; .*pip install 'bnext-qat\[tensorboard\]'"),
    ],
)
def test_trackers_are_refused_in_words(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["mlflow"])
    with pytest.raises(RecipeError, match=f"tracking.trackers: {message}"):
        check_trackers(Tracking(trackers=[name]))
    check_trackers(Tracking())


def test_a_refused_tracker_leaves_no_run(tmp_path: Path) -> None:
    said = fail(2, *arguments("pretrain", tmp_path, "tracking.trackers=[tensorbord]"))
    assert "did you mean 'tensorboard'" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("project", ["", "../elsewhere", "a/b", ".hidden"])
def test_a_project_is_no_path(project: str, tmp_path: Path) -> None:
    said = fail(2, *arguments("pretrain", tmp_path, f"tracking.project={json.dumps(project)}"))
    assert "tracking.project: found" in said


def test_a_tracker_that_fails_under_way_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.tracking import TensorBoardTracker

    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("nobody listens")

    monkeypatch.setattr(TensorBoardTracker, "log", fails)
    result = qat(*arguments("pretrain", tmp_path, *BOARD))
    assert result.exit_code == 0
    said = result.output.replace("\n", " ")
    assert said.count("warning: tracking: tensorboard fails, training goes on without: nobody listens") == 1
    assert len(rows(the_run(tmp_path))) == 2


def _loads_accelerate(words: list[str]) -> bool:
    """Whether a command does, in a process where neither accelerate nor any part of `qat` is loaded yet."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("accelerate", "qat"):
            del sys.modules[name]
    from qat.cli.group import main

    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code
    return "accelerate" in sys.modules


def test_accelerate_is_loaded_for_trackers_alone(tmp_path: Path) -> None:
    words = ["schedule.epochs=1", "data.batch_size=640", "data.augment={}"]
    (plain,) = call(_loads_accelerate, arguments("pretrain", tmp_path, *words), size=1)
    (tracked,) = call(_loads_accelerate, arguments("pretrain", tmp_path, *BOARD, *words), size=1)
    assert (plain, tracked) == (False, True)
