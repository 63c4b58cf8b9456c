"""Runs in Python, of a recipe's images and of a user's own batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from qat.errors import DataError
from tests.helpers.toy_runs import TOY


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = 0.25 + 0.5 * labels[:, None, None, None] + 0.1 * torch.randn(count, 3, 8, 8, generator=random)
    return list(zip(pixels.clamp(0, 1).split(5), labels.split(5), strict=True))


def recipe(out: Path, checkpoint: Path, *more: str) -> Any:
    fixed = ["data.batch_size=10", "schedule.calibration_batches=2", "model.num_classes=null"]
    own = [*TOY, f"output.dir={out}", f"model.checkpoint={checkpoint}", *fixed, "schedule.epochs=1"]
    return qat.load_recipe("tiny_int8", [*own, *more])


def test_batches_of_ones_own_are_fine_tuned_on(start: Path, tmp_path: Path) -> None:
    run = qat.finetune(
        recipe(tmp_path, start, "schedule.float_epochs=2"),
        batches(40, 0),
        iter(batches(20, 1)),
        class_names=["dark", "light"],
    )
    model = qat.load(run.path)
    assert model.facts.class_names == ("dark", "light")
    assert run.summary()["int8"]["n"] == 20
    found = qat.evaluate(model, batches(20, 1))  # mean 0 and std 1: pixels are normalized images
    assert found.top1 == run.summary()["int8"]["top1"]


def test_a_recipe_is_named_by_name_file_or_value(start: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, start, "schedule.epochs=0")
    for one in (loaded, loaded.recipe):
        run = qat.finetune(one, batches(20, 0), batches(10, 1))
        assert run.summary()["calibrated"]["n"] == 10
    with pytest.raises(qat.QatError, match="no such recipe"):
        qat.finetune("tiny_int9")


def test_a_network_is_trained_from_random_weights(tmp_path: Path) -> None:
    loaded = qat.load_recipe(
        "tiny_digits_pretrain",
        [*TOY, "model.num_classes=null", "schedule.epochs=1", "data.batch_size=10", f"output.dir={tmp_path}"],
    )
    run = qat.pretrain(loaded, batches(40, 0), batches(20, 1))
    assert qat.load(run.path).architecture.num_classes == 2


def test_a_path_is_evaluated_on_its_own_images(start: Path) -> None:
    assert qat.evaluate(start).n == qat.evaluate(str(start.parent)).n == 360


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((batches(20, 0), None), "give both train and test"),
        (([], batches(5, 0)), "no images"),
        ((batches(20, 0), [(torch.zeros(1, 3, 8, 8), torch.tensor([2]))]), "labels run from 2 to 2"),
        ((batches(5, 0), batches(5, 0)), "10 is more than the 5 training images"),
    ],
)
def test_batches_that_cannot_be_used_are_refused(
    start: Path, tmp_path: Path, arguments: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        qat.finetune(recipe(tmp_path / "runs", start), *arguments)
    assert not (tmp_path / "runs").exists()


def test_a_network_in_memory_needs_batches_to_be_evaluated() -> None:
    with pytest.raises(DataError, match="has no images; give batches"):
        qat.evaluate(qat.BNext(2, widths=[8, 8]))
    with pytest.raises(DataError, match="uint8, allowed: normalized float images"):
        qat.evaluate(
            qat.BNext(2, widths=[8, 8]), [(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]))]
        )
