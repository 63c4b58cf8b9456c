"""Fine-tuning: a pretrained binary network is calibrated and then trained with fake quantization."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from qat.checkpoints.format import as_stored, load_checkpoint
from qat.checkpoints.loading import architecture_of, highest_temperature, load_state, without_quantizers
from qat.errors import CheckpointError, QuantizationError
from qat.models.bnext import BNext, binary_convolutions, is_binary
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.calibration import calibrate, freeze_observers
from qat.quantize.image_grid import image_grid
from qat.quantize.naming import quantization_name
from qat.quantize.preparation import prepare, quantization_map
from qat.recipe.loading import LoadedRecipe, resolve_checkpoint
from qat.recipe.schema import Recipe
from qat.runs import RunDirectory
from qat.train.device import begin
from qat.train.job import Hooks, Job
from qat.train.loop import fit
from qat.train.parallel import check_parallel
from qat.train.progress import Progress
from qat.train.reporter import Reporter, SilentReporter
from qat.train.resume import NewRun, Resumed
from qat.train.setup import (
    begin_job,
    calibration_pass,
    for_task,
    reestimate,
    splits_of,
    summarize,
    under_way,
)
from qat.train.teachers import Teacher, Teachers, load_teachers


def finetune(
    loaded: LoadedRecipe, reporter: Reporter | None = None, resumed: Resumed | None = None
) -> RunDirectory:
    """Calibrate a pretrained binary network and fine-tune it with fake quantization.

    Args:
        loaded: a recipe with ``task: finetune``; for a resumed run, ``resumed.loaded``.
        reporter: is told about the progress; by default nothing is reported.
        resumed: the run to resume, from :func:`qat.train.resume.open_run`; by default a new run begins.

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
    splits = splits_of(recipe)
    start = resolve_checkpoint(loaded)
    float_model = pretrained(start, recipe, reporter).to(device)
    model = copy.deepcopy(float_model)
    prepare(model, recipe.quantization, image_grid(recipe.data.mean, recipe.data.std))
    # This is checked before the run directory is made, so that a recipe which quantizes nothing leaves none
    # behind.
    if not quantization_map(model):
        raise QuantizationError(
            f"{loaded.path}: quantization: nothing is left to quantize; enable stem, se, classifier or "
            "trunk, or check include and exclude"
        )
    if recipe.teacher == "self":
        own = Teacher(float_model.eval().requires_grad_(False))
        teachers = Teachers([own], recipe.distillation.temperature, recipe.distillation.weight)
    else:
        teachers = load_teachers(loaded, splits.train.class_names, device, reporter)
    hooks = Hooks(before_step=_freeze, after_training=reestimate)
    run = resumed or NewRun(loaded)
    job, progress = begin_job(run, model, splits, start, teachers, hooks, reporter)
    with under_way(job):
        if not job.state.tensors:
            _calibrate(job, progress, float_model)
        if recipe.schedule.freeze_binary:
            for conv in binary_convolutions(model).values():
                conv.weight.requires_grad_(False)
        fit(job, progress)
        best = summarize(job, progress, "int8")
    reporter.message(
        f"{quantization_name(model, recipe.quantization)}: top-1 {best.top1:.2f}% "
        f"(epoch {progress.best_epoch}), "
        f"{best.top1 - progress.accuracies['float'].top1:+.2f} points against float rest"
    )
    return job.run


def pretrained(path: Path, recipe: Recipe, reporter: Reporter) -> BNext:
    """The recipe's network, not quantized yet, with the weights of the checkpoint at ``path``.

    Args:
        path: file of the checkpoint.
        recipe: says the architecture, and the preprocessing that the checkpoint should have been trained
            with.
        reporter: is warned if the checkpoint is fine-tuned already, or was trained with other preprocessing.

    Raises:
        CheckpointError: the checkpoint can't be read, doesn't fit the network, or has weights in use other
            than ±1.
    """
    architecture = architecture_of(recipe.model)
    checkpoint = load_checkpoint(path, latent=recipe.model.latent, stem_stride=architecture.stem_stride)
    if checkpoint.quantization is not None:
        reporter.warning(f"{path}: already fine-tuned; starting from its weights, its ranges are found anew")
    model = BNext.from_architecture(architecture)
    load_state(model, without_quantizers(checkpoint))
    if not is_binary(model):
        raise CheckpointError(
            f"{path}: the weights in use are not binary yet: the temperature is "
            f"{highest_temperature(model):.3g}, binary means below 1e-7. Train on until it has annealed "
            "(qat pretrain)"
        )
    if checkpoint.recipe is not None:
        for key in ("image_size", "mean", "std"):
            trained, asked = getattr(checkpoint.recipe.data, key), getattr(recipe.data, key)
            if trained != asked:
                reporter.warning(f"data.{key} is {asked}, the checkpoint was trained with {trained}")
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


def _calibrate(job: Job, progress: Progress, float_model: BNext) -> None:
    """Find the grids of ``job.model``, evaluate before and after that, and write the quantization map."""
    recipe, model, reporter = job.recipe, job.model, job.reporter
    before = job.evaluate(float_model)
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
    progress.accuracies = {"float": before, "calibrated": calibrated}
    progress.accuracy = calibrated
