"""Pretraining and quantization-aware fine-tuning: two ways into the one loop of :mod:`qat.train.loop`."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from qat.checkpoints.format import as_stored, load_checkpoint
from qat.checkpoints.loading import architecture_of, highest_temperature, load_state, without_quantizers
from qat.data.augment import normalize
from qat.data.loading import check_fits, load_splits
from qat.data.split import Split
from qat.errors import CheckpointError, DataError, QuantizationError, RecipeError
from qat.models.bnext import BNext, binary_convolutions, is_binary, set_temperature
from qat.quantize.calibration import calibrate
from qat.quantize.image_grid import image_grid
from qat.quantize.preparation import prepare, quantization_map
from qat.quantize.quantizers import activation_quantizers, freeze_observers
from qat.recipe.loading import LoadedRecipe, resolve_checkpoint
from qat.recipe.schema import Recipe
from qat.runs import SUMMARY, RunDirectory
from qat.system.collectives import is_main, world
from qat.train.batch_norm_reestimation import reestimate_batch_norm
from qat.train.device import begin
from qat.train.loop import Job, Reporter, fit, step_count
from qat.train.optimizer import temperature_at
from qat.train.parallel import check_parallel
from qat.train.precision import saves_no_time
from qat.train.provenance import check_alike, run_facts
from qat.train.resume import Resumed, begun, check_same, held, resume_command
from qat.train.sharding import shards
from qat.train.state_file import remove_states, write_state
from qat.train.teachers import Teacher, Teachers, load_teachers
from qat.train.trackers import check_trackers, tracked


def finetune(loaded: LoadedRecipe, report: Reporter, resumed: Resumed | None = None) -> RunDirectory:
    """Calibrate and fine-tune a pretrained binary network with fake quantization.

    Args:
        loaded: a recipe with ``task: finetune``; ``resumed.loaded`` for a run that goes on.
        report: told about progress.
        resumed: the run that goes on, from :func:`qat.train.resume.open_run`.

    Returns:
        The finished run's directory.

    Raises:
        Stopped: SIGTERM came; the run can be resumed.
        QatError: see the tree in :mod:`qat.errors`.
    """
    recipe = for_task(loaded, "finetune")
    check_parallel(recipe)
    assert recipe.quantization is not None  # the schema requires it for this task
    device = begin(recipe)
    train, test = splits_of(recipe)
    start = resolve_checkpoint(loaded)
    float_model = pretrained(start, recipe, report).to(device)
    model = copy.deepcopy(float_model)
    prepare(model, recipe.quantization, image_grid(recipe.data.mean, recipe.data.std))
    # Asked before there is a run directory, which a recipe that quantizes nothing must not leave behind.
    if not quantization_map(model):
        raise QuantizationError(
            f"{loaded.path}: quantization: nothing is left to quantize; enable stem, se, classifier or "
            "trunk, or check include and exclude"
        )
    job = _begin_job(loaded, recipe, model, (train, test), start, report, resumed)
    job.before_step = lambda share: apply_freezes(model, recipe, share)
    with _under_way(job):
        if job.state is None:
            _calibrate(job, float_model)
        if recipe.schedule.freeze_binary:
            for conv in binary_convolutions(model).values():
                conv.weight.requires_grad_(False)
        if recipe.teacher == "self":
            own = Teacher(float_model.eval().requires_grad_(False))
            job.teacher = Teachers([own], recipe.distillation.temperature)
        fit(job)
        assert job.best is not None
        _summarize(job, "int8")
    report.message(
        f"int8: top-1 {job.best.top1:.2f}% (epoch {job.best_epoch}), "
        f"{job.best.top1 - job.accuracies['float'].top1:+.2f} points against float rest"
    )
    return job.run


def _calibrate(job: Job, float_model: BNext) -> None:
    """Find the grids of ``job.model``; the accuracies before and after that, and the quantization map."""
    recipe, model, report = job.recipe, job.model, job.report
    before = job.evaluate(float_model)
    report.message(f"float rest: top-1 {before.top1:.2f}% of {before.n} images")
    if any(True for _ in activation_quantizers(model)):  # weights alone need no calibration
        calibrate(model, lambda: calibration_pass(model, job.train, recipe, job.device, job.check_stop))
    stored = as_stored(model, recipe.output.float_weights)
    calibrated = job.evaluate(stored)
    points = quantization_map(model)
    report.message(
        f"calibrated {len(points)} quantization points: top-1 {calibrated.top1:.2f}% before training"
    )
    job.run.write_json("quantization.json", points)
    job.accuracies = {"float": before, "calibrated": calibrated}
    job.accuracy = calibrated


def pretrain(loaded: LoadedRecipe, report: Reporter, resumed: Resumed | None = None) -> RunDirectory:
    """Train a binary network from random weights, annealing the weight temperature to binary.

    Args:
        loaded: a recipe with ``task: pretrain``; ``resumed.loaded`` for a run that goes on.
        report: told about progress.
        resumed: the run that goes on, from :func:`qat.train.resume.open_run`.

    Returns:
        The finished run's directory; ``best`` is the best epoch whose weights were exactly ±1.

    Raises:
        Stopped: SIGTERM came; the run can be resumed.
    """
    recipe = for_task(loaded, "pretrain")
    check_parallel(recipe)
    device = begin(recipe)
    train, test = splits_of(recipe)
    model = BNext.from_architecture(architecture_of(recipe.model))
    start = None if recipe.model.checkpoint is None else resolve_checkpoint(loaded)
    if start is not None:
        load_state(model, without_quantizers(load_checkpoint(start, latent=recipe.model.latent)))
    model.to(device)
    job = _begin_job(loaded, recipe, model, (train, test), start, report, resumed)
    schedule = recipe.schedule
    job.before_step = lambda share: set_temperature(
        model, temperature_at(schedule.temperature, share, schedule.epochs)
    )
    with _under_way(job):
        fit(job)
        assert job.best is not None  # the schema puts the end of the annealing below 1e-7
        _summarize(job, "binary")
    report.message(f"binary: top-1 {job.best.top1:.2f}% of {job.best.n} images (epoch {job.best_epoch})")
    return job.run


def _begin_job(
    loaded: LoadedRecipe,
    recipe: Recipe,
    model: BNext,
    splits: tuple[Split, Split],
    start: Path | None,
    report: Reporter,
    resumed: Resumed | None,
) -> Job:
    """A new run with its directory, or the one that goes on, as far as it was; its weights stay as they are.

    ``recipe`` has the paths as they are to be read; checkpoints are given them as they were written first.
    """
    train, test = splits
    device = next(model.parameters()).device
    named = recipe.teacher == "named"
    teachers = load_teachers(loaded, test.class_names, device, report) if named else None
    facts = run_facts(train, test, start, teachers)
    check_alike(facts, resumed)
    check_trackers(recipe.tracking)
    slow = saves_no_time(recipe.precision, device)
    if slow is not None:
        report.warning(slow)
    if shards(recipe):
        report.message(f"FSDP: each of {world().size} processes keeps its part of the network")
    if resumed is None:
        run = RunDirectory.create(loaded)
        report = tracked(report, recipe, run, device)
        report.message(f"{model.architecture}, run directory {run.path}")
        return Job(recipe, model, train, test, device, run, report, teachers, metadata=facts)
    report = tracked(report, resumed.recipe, resumed.run, device)
    job = Job(resumed.recipe, model, train, test, device, resumed.run, report, teachers, metadata=facts)
    if resumed.state is None:
        report.message(f"{model.architecture}, run directory {job.run.path}: begins again, nothing was saved")
        return job
    check_same(resumed.state, recipe, facts, device, report)
    record = resumed.state.record
    job.state, job.rows, job.accuracies = resumed.state, list(record.rows), dict(record.accuracies)
    job.epoch, job.running, job.accuracy = record.epoch, record.running, record.accuracy
    job.best, job.best_epoch, job.seconds_before = record.best, record.best_epoch, record.seconds
    steps = f" and {job.running.step} steps" if job.running.step else ""
    report.message(
        f"{model.architecture}, run directory {job.run.path}: goes on after {job.epoch} of "
        f"{recipe.schedule.epochs} epochs{steps}"
    )
    return job


def _reestimate(job: Job, model: BNext) -> None:
    """Average the batch-norm statistics of ``model`` anew, over as many batches as the recipe asks for."""
    count = job.recipe.schedule.reestimate_batch_norm
    if count:
        reestimate_batch_norm(
            model,
            lambda: calibration_pass(model, job.train, job.recipe, job.device, job.check_stop, count),
        )


@contextmanager
def _under_way(job: Job) -> Iterator[None]:
    """Hold the run's directory and heed SIGTERM; an interruption says how to go on, the end tidies up."""
    path = job.run.path
    job.stop.patient = world().size > 1
    job.after_training = lambda model: _reestimate(job, model)
    with held(job.run):
        try:
            with job.stop:
                if job.state is None and is_main():
                    write_state(path, begun(job.recipe, job.metadata, job.device), {}, keep=1)
                yield
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"go on with: {resume_command(job.recipe.task, path)}") from error
        if is_main():
            remove_states(path)


def apply_freezes(model: BNext, recipe: Recipe, share: float) -> None:
    """Fix observers and batch-norm statistics once their share of the training is over."""
    if share >= recipe.schedule.freeze_observers:
        freeze_observers(model)
    if share >= recipe.schedule.freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def _summarize(job: Job, name: str) -> None:
    assert job.best is not None
    job.run.write_json(
        SUMMARY,
        {
            "task": job.recipe.task,
            "architecture": str(job.model.architecture),
            **{when: asdict(accuracy) for when, accuracy in job.accuracies.items()},
            name: asdict(job.best),
            "best_epoch": job.best_epoch,
            "checkpoint": job.run.best.name,
            # Null where training started from random weights.
            "pretrained_sha256": job.metadata.get("pretrained_sha256"),
            "seconds": job.seconds,
            "finished": time.time(),
            "data": {"train": job.metadata["train_fingerprint"], "test": job.metadata["test_fingerprint"]},
            "versions": json.loads(job.metadata["versions"]),
        },
    )


def calibration_pass(
    model: BNext,
    train: Split,
    recipe: Recipe,
    device: torch.device,
    before_batch: Callable[[], None] = lambda: None,
    count: int | None = None,
) -> None:
    """Some batches of clean training images, in an order that depends on the seed alone.

    As many as the recipe calibrates with, or ``count``.
    """
    batches = train.batches(recipe.data.batch_size, shuffle_seed=recipe.seed)
    count = recipe.schedule.calibration_batches if count is None else count
    for _, (images, _) in zip(range(count), batches, strict=False):
        before_batch()
        if images.shape[-1] != recipe.data.image_size:  # larger where training crops at random
            images = _centre(images, recipe.data.image_size)
        model(normalize(images.to(device), recipe.data.mean, recipe.data.std))


def _centre(images: Tensor, side: int) -> Tensor:
    top, left = ((length - side) // 2 for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def pretrained(path: Path, recipe: Recipe, report: Reporter) -> BNext:
    """The recipe's float-rest network with the weights of the checkpoint at ``path``.

    Args:
        path: of the checkpoint.
        recipe: with the architecture, and the data that the checkpoint should have been trained on.
        report: told what is unusual.

    Raises:
        CheckpointError: it can't be read, does not fit the network, or is not binary.
    """
    architecture = architecture_of(recipe.model)
    checkpoint = load_checkpoint(path, latent=recipe.model.latent, stem_stride=architecture.stem_stride)
    if checkpoint.quantization is not None:
        report.warning(f"{path}: already fine-tuned; starting from its weights, its ranges are found anew")
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
                report.warning(f"data.{key} is {asked}, the checkpoint was trained with {trained}")
    return model


def splits_of(recipe: Recipe) -> tuple[Split, Split]:
    """The training and the test split of a recipe.

    Raises:
        DataError: one can't be read, does not fit the network, or is too small for a batch.
        RecipeError: the processes can't share a batch evenly.
    """
    train, test = load_splits(recipe.data)
    for split in (train, test):
        check_fits(split, recipe.model.num_classes)
        split.share = world().share
    if recipe.data.batch_size % world().size:
        raise RecipeError(
            f"data.batch_size: found {recipe.data.batch_size}, allowed with {world().size} processes, which "
            f"share it: a multiple of {world().size}"
        )
    if recipe.schedule.epochs and not train.batch_count(recipe.data.batch_size, drop_last=True):
        raise DataError(
            f"data.batch_size: {recipe.data.batch_size} is more than the {len(train)} training images"
        )
    if recipe.schedule.epochs and not step_count(recipe, train):
        raise DataError(
            f"schedule.accumulate: found {recipe.schedule.accumulate}, allowed: at most the "
            f"{train.batch_count(recipe.data.batch_size, drop_last=True)} batches of an epoch"
        )
    return train, test


def for_task(loaded: LoadedRecipe, task: str, command: str | None = None) -> Recipe:
    """The recipe, if it is for ``task``; ``command`` is the one in use, ``task`` itself by default.

    Raises:
        RecipeError: it is for the other task.
    """
    if loaded.recipe.task != task:
        raise RecipeError(
            f"{loaded.path}: task: this recipe is for `qat {loaded.recipe.task}`, not `qat {command or task}`"
        )
    return loaded.recipe
