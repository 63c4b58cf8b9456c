"""Fine-tuning: what is frozen when, whole runs, equal runs, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat.checkpoints.format import file_hash, load_checkpoint, save_checkpoint
from qat.checkpoints.loading import build
from qat.data.loading import load_split
from qat.errors import CheckpointError, DataError, QuantizationError, RecipeError, TrainingError
from qat.evaluation import evaluate, predictor
from qat.models.bnext import binary_convolutions, set_temperature
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.preparation import quantization_map
from qat.recipe.loading import load_recipe
from qat.runs import RunDirectory
from qat.train.batch_norm_reestimation import reestimate_batch_norm
from qat.train.finetuning import apply_freezes, finetune
from qat.train.pretraining import pretrain
from qat.train.setup import calibration_pass, splits_of
from tests.helpers import toy_runs as toyruns
from tests.helpers.cases import slow
from tests.helpers.toy_runs import Silent


@pytest.fixture
def checkpoint(start: Path) -> Path:
    return start


#: The observer whose ranges follow every batch.
MOVING = "quantization.trunk.observer=moving_average"


def tune(checkpoint: Path, out: Path, *overrides: str) -> tuple[RunDirectory, Silent]:
    report = Silent()
    fixed = ("schedule.epochs=2", "schedule.calibration_batches=2", "data.batch_size=320")
    loaded = toyruns.recipe("tiny_int8", out, *fixed, *overrides, checkpoint=checkpoint)
    return finetune(loaded, report), report


def lines(run: RunDirectory) -> list[dict[str, Any]]:
    text = (run.path / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key not in ("seconds", "images_per_second")}


# Freezes


@pytest.mark.parametrize(
    ("share", "observers", "norms"), [(0.2, 0, 0), (0.4, 1, 0), (0.7, 1, 1), (1.0, 1, 1)]
)
def test_observers_and_batch_norm_freeze_at_their_shares(
    tmp_path: Path, make_toy: Any, share: float, observers: bool, norms: bool
) -> None:
    overrides = ("schedule.freeze_observers=0.4", "schedule.freeze_batch_norm=0.7")
    recipe = toyruns.recipe("tiny_int8", tmp_path, *overrides).recipe
    model = make_toy().train()
    apply_freezes(model, recipe, share)
    assert {not point.observing for _, point in activation_quantizers(model)} == {bool(observers)}
    modes = {module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    assert modes == {not norms}


def test_frozen_scales_and_statistics_do_not_move(checkpoint: Path, tmp_path: Path) -> None:
    """Training doesn't change frozen scales and statistics; without freezing it does."""
    states = {}
    for name, share in (("frozen", "0.0"), ("free", "1.0")):
        overrides = (f"schedule.freeze_observers={share}", f"schedule.freeze_batch_norm={share}")
        run, _ = tune(checkpoint, tmp_path / name, "schedule.epochs=1", MOVING, *overrides)
        states[name] = load_checkpoint(run.last).state
    zero, _ = tune(checkpoint, tmp_path / "zero", "schedule.epochs=0", MOVING)
    calibrated = load_checkpoint(zero.last).state
    statistics = [key for key in calibrated if key.endswith("running_mean")]
    scales = [key for key in calibrated if key.endswith("trunk_out.fake.scale")]
    assert statistics
    assert scales
    for key in (*statistics, *scales):
        assert torch.equal(states["frozen"][key], calibrated[key]), key
    for keys in (statistics, scales):
        assert not all(torch.equal(states["free"][key], calibrated[key]) for key in keys)


@pytest.mark.parametrize("ema", ["null", slow("0.9")])
def test_statistics_are_averaged_anew_after_the_last_step_and_before_the_evaluation(
    checkpoint: Path, tmp_path: Path, ema: str
) -> None:
    options = ("schedule.epochs=2", f"schedule.ema={ema}", MOVING)
    plain, _ = tune(checkpoint, tmp_path / "plain", *options)
    anew, report = tune(checkpoint, tmp_path / "anew", *options, "schedule.reestimate_batch_norm=3")
    recipe = toyruns.recipe("tiny_int8", tmp_path, "data.batch_size=320").recipe
    train, test, _ = splits_of(recipe)
    model = build(load_checkpoint(plain.last))
    reestimate_batch_norm(model, lambda: calibration_pass(model, train, recipe, torch.device("cpu"), count=3))
    expected, found = model.state_dict(), build(load_checkpoint(anew.last)).state_dict()
    before = build(load_checkpoint(plain.last)).state_dict()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], msg=key)
        if not key.endswith(("running_mean", "running_var")):
            assert torch.equal(value, before[key]), key
    assert not torch.equal(
        found["feature.1.FFN.norm1.running_mean"], before["feature.1.FFN.norm1.running_mean"]
    )
    assert report.epochs[0]["test_loss"] == lines(plain)[0]["test_loss"]
    again = evaluate(predictor(build(load_checkpoint(anew.last))), test, recipe.data)
    assert report.epochs[1]["test_loss"] == pytest.approx(again.loss)
    assert report.epochs[1]["test_loss"] != lines(plain)[1]["test_loss"]


def test_statistics_that_are_no_numbers_end_the_training(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise QuantizationError("feature.0.bn1: its statistics over these batches are not finite")

    monkeypatch.setattr("qat.train.setup.reestimate_batch_norm", broken)
    with pytest.raises(TrainingError, match=r"epoch 1: feature\.0\.bn1: its statistics .* checkpoint"):
        tune(checkpoint, tmp_path, "schedule.epochs=1", "schedule.reestimate_batch_norm=1")


def test_frozen_binary_weights_keep_their_signs(checkpoint: Path, tmp_path: Path) -> None:
    options = ("optimizer.binary_lr=0.5", "schedule.epochs=1")
    before = load_checkpoint(checkpoint).state
    key = "feature.1.Attention.binary_conv.weight"
    frozen, _ = tune(checkpoint, tmp_path / "a", *options, "schedule.freeze_binary=true")
    free, _ = tune(checkpoint, tmp_path / "b", *options, "schedule.freeze_binary=false")
    assert torch.equal(load_checkpoint(frozen.last).state[key], before[key])
    assert not torch.equal(load_checkpoint(free.last).state[key], before[key])


# Whole runs


# One worker makes these runs.
twice_tuned = pytest.mark.xdist_group("twice_tuned")


@pytest.fixture(scope="module")
def twice(
    start: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[RunDirectory, Silent], RunDirectory]:
    """The same fine-tuning twice, the first with what it reported. To be read only."""
    out = tmp_path_factory.mktemp("twice") / "runs"
    first = tune(start, out)
    torch.rand(7)  # the random state of earlier tests must not matter
    return first, tune(start, out)[0]


@twice_tuned
def test_the_same_recipe_and_seed_give_the_same_metrics_and_the_same_bytes(
    twice: tuple[tuple[RunDirectory, Silent], RunDirectory], checkpoint: Path, tmp_path: Path
) -> None:
    (first, _), second = twice
    assert first.path != second.path
    assert [timeless(one) for one in lines(first)] == [timeless(one) for one in lines(second)]
    for name in ("best.safetensors", "last.safetensors", "quantization.json", "recipe.yaml"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name
    other, _ = tune(checkpoint, tmp_path / "runs", "seed=1")
    assert [timeless(one) for one in lines(first)] != [timeless(one) for one in lines(other)]


def test_pretraining_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    assert toyruns.pretrain_toy(tmp_path).read_bytes() == toyruns.pretrain_toy(tmp_path).read_bytes()


@twice_tuned
def test_a_run_leaves_metrics_summary_checkpoints_and_map(
    twice: tuple[tuple[RunDirectory, Silent], RunDirectory], tmp_path: Path
) -> None:
    (run, report), _ = twice
    metrics = lines(run)
    assert [one["epoch"] for one in metrics] == [1, 2]
    keys = "epoch loss top1 learning_rate temperature images_per_second seconds test_top1 test_top5 test_loss"
    assert all(set(one) == set(keys.split()) for one in metrics)
    assert report.epochs == metrics
    assert report.started == (2, 1437 // 320)
    assert [epoch for epoch, _ in report.steps] == [1] * 4 + [2] * 4
    assert report.steps[3][1]["loss"] == metrics[0]["loss"]
    assert report.stopped == 1

    summary = run.summary()
    assert summary["task"] == "finetune"
    assert summary["best_epoch"] in (0, 1, 2)
    candidates = [summary["calibrated"]["top1"], *(one["test_top1"] for one in metrics)]
    assert summary["int8"]["top1"] == max(candidates) == candidates[summary["best_epoch"]]
    assert summary["float"]["n"] == summary["int8"]["n"] == 360
    assert summary["checkpoint"] == "best.safetensors"
    assert summary["versions"]["torch"]
    assert set(summary["data"]) == {"train", "test"}
    assert json.loads((run.path / "quantization.json").read_text(encoding="utf-8"))

    best = load_checkpoint(run.best)
    data = toyruns.recipe("tiny_int8", tmp_path).recipe.data
    again = evaluate(predictor(build(best)), load_split(data, "test"), data)
    assert again.top1 == summary["int8"]["top1"]
    assert json.loads(best.metadata["accuracy"])["top1"] == summary["int8"]["top1"]
    assert best.recipe is not None
    assert best.recipe.schedule.epochs == 2


def test_the_checkpoint_a_run_started_from_is_on_record(checkpoint: Path, tmp_path: Path) -> None:
    run, _ = tune(checkpoint, tmp_path, "schedule.epochs=0")
    for facts in (run.summary(), load_checkpoint(run.best).metadata, load_checkpoint(run.last).metadata):
        assert facts["pretrained_sha256"] == file_hash(checkpoint)
    # Paths are stored as they were given, so that equal runs give equal checkpoints in every folder.
    stored = load_checkpoint(run.best).recipe
    assert stored is not None
    assert stored.model.checkpoint == str(checkpoint)
    again = load_checkpoint(checkpoint)
    assert "pretrained_sha256" not in again.metadata
    assert RunDirectory(checkpoint.parent).summary()["pretrained_sha256"] is None


def test_pretraining_that_starts_from_a_checkpoint_records_it(checkpoint: Path, tmp_path: Path) -> None:
    best = toyruns.pretrain_toy(tmp_path, f"model.checkpoint={checkpoint}")
    assert load_checkpoint(best).metadata["pretrained_sha256"] == file_hash(checkpoint)


def test_the_recipe_of_a_run_can_be_run_from_another_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    run, _ = tune(Path(checkpoint.name), tmp_path, "schedule.epochs=0")
    stored = load_checkpoint(run.best).recipe
    assert stored is not None
    assert stored.model.checkpoint == checkpoint.name
    monkeypatch.chdir(tmp_path)
    again = finetune(load_recipe(run.path / "recipe.yaml"), Silent())
    assert load_checkpoint(again.best).metadata["accuracy"] == load_checkpoint(run.best).metadata["accuracy"]


def test_no_epochs_calibrate_and_stop(checkpoint: Path, tmp_path: Path) -> None:
    run, _ = tune(checkpoint, tmp_path, "schedule.epochs=0", "data.batch_size=5000")
    assert not (run.path / "metrics.jsonl").exists()
    summary = run.summary()
    assert summary["best_epoch"] == 0
    assert summary["int8"] == summary["calibrated"]


@pytest.mark.parametrize("size", ["1400", slow("64")])
def test_annealing_reaches_its_end_however_few_the_steps(tmp_path: Path, size: str) -> None:
    overrides = (f"data.batch_size={size}", "schedule.temperature.share=1.0", "schedule.temperature.end=9e-8")
    best = toyruns.pretrain_toy(tmp_path, *overrides)
    model = build(load_checkpoint(best))
    assert all(conv.is_binary() for conv in binary_convolutions(model).values())


@twice_tuned
def test_a_teacher_changes_training_and_can_be_switched_off(
    twice: tuple[tuple[RunDirectory, Silent], RunDirectory], checkpoint: Path, tmp_path: Path
) -> None:
    with_teacher = twice[1]
    without, _ = tune(checkpoint, tmp_path, "distillation.teacher=none")
    assert lines(with_teacher)[0]["loss"] != lines(without)[0]["loss"]


def test_a_fine_tuned_checkpoint_may_be_tuned_again_with_a_warning(checkpoint: Path, tmp_path: Path) -> None:
    run, report = tune(checkpoint, tmp_path, "schedule.epochs=0")
    assert report.warnings == []
    _, report = tune(run.best, tmp_path, "schedule.epochs=0")
    assert len(report.warnings) == 1
    assert "already fine-tuned" in report.warnings[0]


def test_data_unlike_the_checkpoints_is_warned_about(checkpoint: Path, tmp_path: Path) -> None:
    _, report = tune(
        checkpoint, tmp_path, "schedule.epochs=0", "data.image_size=16", "data.mean=[0.1,0.1,0.1]"
    )
    assert [warning.split()[0] for warning in report.warnings] == ["data.image_size", "data.mean"]


# What goes wrong


OFF = tuple(f"quantization.{group}.enabled=false" for group in ("se", "classifier", "trunk"))


@pytest.mark.parametrize(
    "overrides",
    [(*OFF, "quantization.stem.enabled=false"), (*OFF, "quantization.exclude=[feature.0]")],
)
def test_a_recipe_that_quantizes_nothing_is_refused_and_leaves_no_run_behind(
    checkpoint: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    with pytest.raises(QuantizationError, match=r"tiny_int8\.yaml: quantization: nothing is left"):
        tune(checkpoint, tmp_path / "runs", *overrides)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("overrides", [OFF, ("quantization.include=[feature.0]",)])
def test_a_recipe_that_quantizes_the_stem_alone_needs_no_calibration(
    checkpoint: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    run, _ = tune(checkpoint, tmp_path, "schedule.epochs=1", *overrides)
    model = build(load_checkpoint(run.best))
    assert set(quantization_map(model)) == {"feature.0.image", "feature.0.weight_quantizer"}
    assert not any(True for _ in activation_quantizers(model))
    assert run.summary()["best_epoch"] in (0, 1)


@pytest.mark.parametrize(
    ("weights", "batch"),
    [
        pytest.param("float32", "320", id="float32-within an epoch"),
        pytest.param("float32", "1400", id="float32-in its last step", marks=pytest.mark.slow),
        # No checkpoint is written, so the type in which it would store weights doesn't matter.
        pytest.param("float16", "320", id="float16-within an epoch", marks=pytest.mark.exhaustive),
        pytest.param("float16", "1400", id="float16-in its last step", marks=pytest.mark.slow),
    ],
)
def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(
    checkpoint: Path, tmp_path: Path, weights: str, batch: str
) -> None:
    options = ("optimizer.lr=1e30", f"data.batch_size={batch}", f"output.float_weights={weights}")
    with pytest.raises(TrainingError, match=r"epoch 1.*the last good checkpoint is .*last\.safetensors"):
        tune(checkpoint, tmp_path, *options)
    (run,) = tmp_path.iterdir()
    assert load_checkpoint(run / "last.safetensors").metadata["epoch"] == "0"
    assert build(load_checkpoint(run / "best.safetensors"))
    assert not (run / "summary.json").exists()
    assert not (run / "metrics.jsonl").exists()


def refused(checkpoint: Path | None, out: Path, *overrides: str, name: str = "tiny_int8") -> str:
    """The message of a refused fine-tuning run, which must not have made a run directory."""
    kinds = (CheckpointError, DataError, QuantizationError, RecipeError)
    with pytest.raises(kinds) as caught:
        finetune(toyruns.recipe(name, out, *overrides, checkpoint=checkpoint), Silent())
    assert not out.exists()
    return str(caught.value)


def test_what_cannot_work_is_refused_before_a_run_directory_is_made(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    assert "5000 is more than the 1437" in refused(checkpoint, out, "data.batch_size=5000")
    assert "the data has 10 classes, the network 7" in refused(checkpoint, out, "model.num_classes=7")
    assert "does not fit the network" in refused(checkpoint, out, "model.widths=[8,16,16]")
    assert "matches no module" in refused(checkpoint, out, "quantization.exclude=[feature.99*]")
    assert "is for `qat pretrain`" in refused(None, out, name="tiny_digits_pretrain")
    assert "found no file" in refused(tmp_path / "absent", out)
    with pytest.raises(RecipeError, match="is for `qat finetune`"):
        pretrain(toyruns.recipe("tiny_int8", out), Silent())


def test_weights_that_are_not_binary_yet_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = build(load_checkpoint(checkpoint))
    set_temperature(model, 0.3)
    save_checkpoint(tmp_path / "soft.safetensors", model, recipe=None)
    message = refused(tmp_path / "soft.safetensors", tmp_path / "runs")
    assert "not binary yet: the temperature is 0.3" in message
