"""The training loop: gradient accumulation, mixed labels and other parts of a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qat.checkpoints.format import load_checkpoint
from qat.checkpoints.loading import build
from qat.data.loading import load_split
from qat.errors import DataError
from qat.evaluation import evaluate, predictor
from qat.runs import RunDirectory
from qat.train.finetuning import finetune
from qat.train.pretraining import pretrain
from tests.helpers import toy_runs as toyruns
from tests.helpers.toy_runs import Silent


def tuned(start: Path, out: Path, *overrides: str) -> tuple[RunDirectory, Silent]:
    """A fine-tuning in which nothing depends on the other images of a batch."""
    report = Silent()
    fixed = ["optimizer.name=sgd", "schedule.freeze_observers=0.0", "schedule.freeze_batch_norm=0.0"]
    fixed += ["schedule.epochs=1", "schedule.calibration_batches=2", "optimizer.clip_norm=1.0"]
    return finetune(toyruns.recipe("tiny_int8", out, *fixed, *overrides, checkpoint=start), report), report


def test_four_batches_in_a_step_are_one_batch_of_their_images(start: Path, tmp_path: Path) -> None:
    # Without this, observed ranges would depend on how images are divided into batches.
    fixed = [f"quantization.{group}.enabled=false" for group in ("se", "classifier", "trunk")]
    fixed += ["data.augment={}", "optimizer.lr=1e-3"]
    weights, rates = [], []
    for size, batches in ((320, 1), (80, 4), (80, 1)):
        overrides = (*fixed, f"data.batch_size={size}", f"schedule.accumulate={batches}")
        run, report = tuned(start, tmp_path / f"{size}-{batches}", *overrides)
        weights.append(load_checkpoint(run.last).state["fc.weight"])
        rates.append(report.epochs[0]["learning_rate"])
        assert report.started == (1, 1437 // size // batches)
    assert torch.allclose(weights[0], weights[1], atol=1e-5)
    assert rates[0] == rates[1]
    assert not torch.allclose(weights[0], weights[2], atol=1e-4)


def test_more_batches_in_a_step_than_an_epoch_has_are_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"schedule.accumulate: found 12, allowed: at most the 11 batches"):
        tuned(start, tmp_path, "data.batch_size=128", "schedule.accumulate=12")
    assert not list(tmp_path.iterdir())


def first_loss(start: Path, out: Path, *overrides: str) -> tuple[float, float]:
    """Loss and top-1 of a pretraining's one step with all images; the network is that of ``start``."""
    fixed = ("schedule.epochs=1", "data.batch_size=1437", "data.augment={}", *overrides)
    report = Silent()
    pretrain(toyruns.recipe("tiny_digits_pretrain", out, *fixed, checkpoint=start), report)
    return report.epochs[0]["loss"], report.epochs[0]["top1"]


def test_labels_are_smoothed_by_their_share(start: Path, tmp_path: Path) -> None:
    train = load_split(toyruns.recipe("tiny_digits_pretrain", tmp_path).recipe.data, "train")
    ((images, labels),) = train.batches(len(train))
    logits = build(load_checkpoint(start)).train()(images.float() / 255)
    expected = torch.log_softmax(logits.detach(), 1)
    own, spread = -expected[torch.arange(len(labels)), labels].mean(), -expected.mean()
    for share in (0.0, 0.4):
        found, _ = first_loss(start, tmp_path, f"loss.label_smoothing={share}")
        assert found == pytest.approx(float((1 - share) * own + share * spread), rel=1e-3)
    assert abs(own - spread) > 1e-2


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_are_trained_on_and_counted_by_their_larger_share(
    start: Path, tmp_path: Path, kind: str
) -> None:
    plain, mixed = first_loss(start, tmp_path), first_loss(start, tmp_path, f"data.augment.{kind}=1.0")
    assert mixed[0] != plain[0]
    # With so small an alpha the share is 0 or 1, so that each image and its label are its own or its
    # partner's.
    whole = first_loss(start, tmp_path, f"data.augment.{kind}=1e-9")
    assert whole == pytest.approx(plain, rel=1e-3)


def test_the_average_is_what_is_evaluated_and_kept(start: Path, tmp_path: Path) -> None:
    options = ("data.batch_size=160", "optimizer.lr=0.1", "distillation.teacher=none")
    plain, _ = tuned(start, tmp_path / "a", *options)
    mean, report = tuned(start, tmp_path / "b", *options, "schedule.ema=0.9")
    kept = load_checkpoint(mean.last)
    assert not torch.equal(kept.state["fc.weight"], load_checkpoint(plain.last).state["fc.weight"])
    recipe = toyruns.recipe("tiny_int8", tmp_path).recipe
    again = evaluate(predictor(build(kept)), load_split(recipe.data, "test"), recipe.data)
    assert again.top1 == report.epochs[0]["test_top1"]
    assert again.loss == pytest.approx(report.epochs[0]["test_loss"])
