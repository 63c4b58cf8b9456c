"""The checkpoints that a run keeps: the last one and the best one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qat.checkpoints.format import load_checkpoint
from qat.data.loading import load_split
from qat.errors import TrainingError
from qat.evaluation import Accuracy
from qat.models.bnext import BNext, set_temperature
from qat.runs import RunDirectory
from qat.train.job import Job, Splits
from qat.train.keeping import keep_checkpoints
from qat.train.progress import Progress
from tests.helpers.networks import toy
from tests.helpers.toy_runs import Silent, recipe


def job(tmp_path: Path, model: BNext) -> Job:
    loaded = recipe("tiny_digits_pretrain", tmp_path, "schedule.epochs=1")
    data = load_split(loaded.recipe.data, "test")
    run = RunDirectory.create(loaded)
    return Job(loaded.recipe, model, Splits(data, data), torch.device("cpu"), run, Silent())


def keep(work: Job, progress: Progress, epoch: int, accuracy: Accuracy) -> None:
    progress.epoch, progress.accuracy = epoch, accuracy
    keep_checkpoints(work, progress, work.model)


def test_a_network_that_is_not_binary_is_never_best(tmp_path: Path) -> None:
    model = toy()
    work, progress = job(tmp_path, model), Progress()
    set_temperature(model, 0.3)
    keep(work, progress, 1, Accuracy(99.0, 100.0, 10, 0.1))
    assert progress.best is None
    assert work.run.last.exists()
    assert not work.run.best.exists()
    set_temperature(model, 1e-8)
    keep(work, progress, 2, Accuracy(20.0, 100.0, 10, 2.0))
    assert progress.best_epoch == 2


def test_best_is_the_highest_accuracy_then_the_lowest_loss_and_last_is_the_last(tmp_path: Path) -> None:
    work, progress = job(tmp_path, toy()), Progress()
    figures = [(50.0, 1.0), (60.0, 2.0), (60.0, 1.5), (60.0, 1.5), (55.0, 0.1)]
    for epoch, (top1, loss) in enumerate(figures, start=1):
        keep(work, progress, epoch, Accuracy(top1, 100.0, 10, loss))
    assert progress.best_epoch == 3
    assert load_checkpoint(work.run.best).metadata["epoch"] == "3"
    assert load_checkpoint(work.run.last).metadata["epoch"] == "5"


def test_a_weight_too_large_for_half_precision_ends_the_training(tmp_path: Path) -> None:
    model = toy()
    work, progress = job(tmp_path, model), Progress()
    half = recipe("tiny_digits_pretrain", tmp_path, "output.float_weights=float16").recipe
    work = replace(work, recipe=half)
    with torch.no_grad():
        model.fc.weight[0, 0] = 1e6
    with pytest.raises(TrainingError, match=r"does not fit float16; no checkpoint was written yet"):
        keep(work, progress, 1, Accuracy(50.0, 100.0, 10, 1.0))
