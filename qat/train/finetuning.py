"""Fine-tuning: a pretrained binary network is calibrated and then trained with fake quantization."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Final

from torch import nn

from qat.checkpoints.format import as_stored
from qat.errors import QuantizationError
from qat.models.bnext import BNext, binary_convolutions
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.calibration import calibrate, freeze_observers
from qat.quantize.image_grid import image_grid
from qat.quantize.naming import quantization_name
from qat.quantize.preparation import prepare, quantization_map
from qat.recipe.loading import LoadedRecipe
from qat.recipe.schema import Recipe
from qat.runs import RunDirectory
from qat.train.device import begin
from qat.train.final import split_name
from qat.train.float_stage import train_in_float
from qat.train.job import Hooks, Job, Splits
from qat.train.loop import fit
from qat.train.parallel import check_parallel
from qat.train.progress import Progress
from qat.train.reporter import Reporter, SilentReporter
from qat.train.resume import NewRun, Resumed
from qat.train.setup import (
    begin_job,
    calibration_pass,
    check_steps,
    for_task,
    reestimate,
    splits_of,
    summarize,
    under_way,
)
from qat.train.starting_point import starting_point
from qat.train.teachers import Teacher, Teachers, load_teachers

#: Epochs of the stage in float in which a new classifier is trained alone.
_HEAD_EPOCHS: Final = 1


def finetune(
    loaded: LoadedRecipe,
    reporter: Reporter | None = None,
    resumed: Resumed | None = None,
    splits: Splits | None = None,
    folder: Path | None = None,
) -> RunDirectory:
    """Calibrate a pretrained binary network and fine-tune it with fake quantization.

    Args:
        loaded: a recipe with ``task: finetune``; for a resumed run, ``resumed.loaded``.
        reporter: is told about the progress; by default nothing is reported.
        resumed: the run to resume, from :func:`qat.train.resume.open_run`; by default a new run begins.
        splits: images in place of those that the recipe names.
        folder: of a new run; by default a new one under ``output.dir``.

    Returns:
        The directory of the finished run.

    Raises:
        Stopped: SIGTERM came; the run can be resumed.
        QatError: one of the other errors in :mod:`qat.errors`.
    """
    reporter = reporter or SilentReporter()
    recipe = for_task(loaded, "finetune")
    check_parallel(recipe)
    assert recipe.quantization is not None  # the schema requires it for this task
    device = begin(recipe)
    splits = splits_of(recipe, splits)
    start = starting_point(loaded, splits.train, reporter)
    recipe = start.recipe
    check_steps(recipe, splits.train)
    float_model = start.network.to(device)
    # This is checked before the run directory is made, so that a recipe which quantizes nothing leaves none
    # behind.
    if not quantization_map(_prepared(float_model, recipe)):
        raise QuantizationError(
            f"{loaded.path}: quantization: nothing is left to quantize; enable stem, se, classifier or "
            "trunk, or check include and exclude"
        )
    teachers = Teachers()
    untrained = start.new_classifier and not start.float_epochs
    if recipe.teacher == "named":
        teachers = load_teachers(start.loaded, splits.train.class_names, device, reporter)
    elif recipe.teacher == "self" and untrained:
        reporter.message(
            "self-distillation is off: with schedule.float_epochs 0 the new classifier has nothing to teach"
        )
    elif recipe.teacher == "self":
        own = Teacher(float_model)
        teachers = Teachers([own], recipe.distillation.temperature, recipe.distillation.weight)
    hooks = Hooks(before_step=_freeze, after_training=reestimate)
    run = resumed or NewRun(start.loaded, folder)
    job, progress = begin_job(run, float_model, splits, start.checkpoint, teachers, hooks, reporter)
    with under_way(job):
        if start.float_epochs:
            head_epochs = _HEAD_EPOCHS if start.new_classifier and start.float_epochs > _HEAD_EPOCHS else 0
            train_in_float(job, float_model, start.float_epochs, head_epochs, reporter)
        float_model.eval()
        model = _prepared(float_model.requires_grad_(True), recipe)
        float_model.requires_grad_(False)
        job = replace(job, model=model)
        if not job.state.tensors:
            _calibrate(job, progress, None if untrained else float_model)
        if recipe.schedule.freeze_binary:
            for conv in binary_convolutions(model).values():
                conv.weight.requires_grad_(False)
        fit(job, progress)
        best = summarize(job, progress, "int8")
    assert recipe.quantization is not None  # the schema requires it for this task
    line = (
        f"{quantization_name(model, recipe.quantization)}: top-1 {best.top1:.2f}% "
        f"on {split_name(job, 'test')}, {best.n} images (epoch {progress.best_epoch})"
    )
    before = progress.accuracies.get("float")
    if before is None:
        line += "; no float-rest network of these classes was trained to compare it with"
    else:
        line += f", {best.top1 - before.top1:+.2f} points against float rest"
    reporter.message(line)
    return job.run


def _prepared(network: BNext, recipe: Recipe) -> BNext:
    """A fake-quantized copy of a float-rest network."""
    assert recipe.quantization is not None
    model = copy.deepcopy(network)
    prepare(model, recipe.quantization, image_grid(recipe.data.mean, recipe.data.std))
    return model


def apply_freezes(model: BNext, recipe: Recipe, share: float) -> None:
    """Freeze grids and batch-norm statistics if the recipe's share of the training is over for them.

    Args:
        model: the network.
        recipe: its schedule has the shares.
        share: how much of the training is done, from 0 to 1.
    """
    if share >= recipe.schedule.freeze_observers:
        freeze_observers(model)
    if share >= recipe.schedule.freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def _freeze(job: Job, share: float) -> None:
    apply_freezes(job.model, job.recipe, share)


def _calibrate(job: Job, progress: Progress, float_model: BNext | None) -> None:
    """Find the grids of ``job.model`` and write the quantization map; evaluate before and afterwards.

    Args:
        job: with the fake-quantized network.
        progress: is given the accuracies.
        float_model: the float-rest network; ``None`` where its classifier has learned nothing, so that its
            accuracy says nothing.
    """
    recipe, model, reporter = job.recipe, job.model, job.reporter
    if float_model is not None:
        before = job.evaluate(float_model)
        progress.accuracies["float"] = before
        reporter.message(f"float rest: top-1 {before.top1:.2f}% of {before.n} images")
    if any(True for _ in activation_quantizers(model)):  # quantizers of weights need no calibration
        train, device = job.splits.train, job.device
        calibrate(model, lambda: calibration_pass(model, train, recipe, device, job.check_stop))
    stored = as_stored(model, recipe.output.float_weights)
    calibrated = job.evaluate(stored)
    points = quantization_map(model)
    reporter.message(
        f"calibrated {len(points)} quantization points: top-1 {calibrated.top1:.2f}% before training"
    )
    job.run.write_json("quantization.json", points)
    progress.accuracies["calibrated"] = calibrated
    progress.accuracy = calibrated
