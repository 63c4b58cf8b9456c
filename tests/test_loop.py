"""The loop: what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toyruns
from networks import toy
from toyruns import Silent

from qat.bnext import BNext, set_temperature
from qat.checkpoint import load_checkpoint
from qat.data import load_split
from qat.errors import TrainingError
from qat.evaluate import Accuracy
from qat.loop import Job, keep
from qat.rundir import RunDirectory

# What is kept


def job(tmp_path: Path, model: BNext) -> Job:
    loaded = toyruns.recipe("tiny_digits_pretrain", tmp_path, "schedule.epochs=1")
    data = load_split(loaded.recipe.data, "test")
    run = RunDirectory.create(loaded)
    return Job(loaded.recipe, model, data, data, torch.device("cpu"), run, Silent())


def test_a_network_that_is_not_binary_is_never_best(tmp_path: Path) -> None:
    model = toy()
    work = job(tmp_path, model)
    set_temperature(model, 0.3)
    keep(work, 1, Accuracy(99.0, 100.0, 10, 0.1))
    assert work.best is None
    assert work.run.last.exists()
    assert not work.run.best.exists()
    set_temperature(model, 1e-8)
    keep(work, 2, Accuracy(20.0, 100.0, 10, 2.0))
    assert work.best_epoch == 2


def test_best_is_the_highest_accuracy_then_the_lowest_loss_and_last_is_the_last(tmp_path: Path) -> None:
    work = job(tmp_path, toy())
    figures = [(50.0, 1.0), (60.0, 2.0), (60.0, 1.5), (60.0, 1.5), (55.0, 0.1)]
    for epoch, (top1, loss) in enumerate(figures, start=1):
        keep(work, epoch, Accuracy(top1, 100.0, 10, loss))
    assert work.best_epoch == 3
    assert load_checkpoint(work.run.best).metadata["epoch"] == "3"
    assert load_checkpoint(work.run.last).metadata["epoch"] == "5"


def test_a_weight_too_large_for_half_precision_ends_the_training(tmp_path: Path) -> None:
    model = toy()
    work = job(tmp_path, model)
    work.recipe = toyruns.recipe("tiny_digits_pretrain", tmp_path, "output.float_weights=float16").recipe
    with torch.no_grad():
        model.fc.weight[0, 0] = 1e6
    with pytest.raises(TrainingError, match=r"does not fit float16; no checkpoint was written yet"):
        keep(work, 1, Accuracy(50.0, 100.0, 10, 1.0))
