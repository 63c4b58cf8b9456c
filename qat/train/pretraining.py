"""Pretraining: a binary network is trained from random weights, or from those of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from qat.models.bnext import set_temperature
from qat.recipe.loading import LoadedRecipe
from qat.runs import RunDirectory
from qat.train.device import begin
from qat.train.final import split_name
from qat.train.job import Hooks, Job, Splits
from qat.train.loop import fit
from qat.train.optimizer import temperature_at
from qat.train.parallel import check_parallel
from qat.train.reporter import Reporter, SilentReporter
from qat.train.resume import NewRun, Resumed
from qat.train.setup import begin_job, check_steps, for_task, reestimate, splits_of, summarize, under_way
from qat.train.starting_point import starting_point
from qat.train.teachers import load_teachers


def pretrain(
    loaded: LoadedRecipe,
    reporter: Reporter | None = None,
    resumed: Resumed | None = None,
    splits: Splits | None = None,
    folder: Path | None = None,
) -> RunDirectory:
    """Train a binary network, annealing the temperature of its weights until each is exactly ±1.

    Args:
        loaded: a recipe with ``task: pretrain``; for a resumed run, ``resumed.loaded``.
        reporter: is told about the progress; by default nothing is reported.
        resumed: the run to resume, from :func:`qat.train.resume.open_run`; by default a new run begins.
        splits: images in place of those that the recipe names.
        folder: of a new run; by default a new one under ``output.dir``.

    Returns:
        The directory of the finished run. Its ``best`` is the best epoch whose weights were exactly ±1.

    Raises:
        Stopped: SIGTERM came; the run can be resumed.
        QatError: one of the other errors in :mod:`qat.errors`.
    """
    reporter = reporter or SilentReporter()
    recipe = for_task(loaded, "pretrain")
    check_parallel(recipe)
    device = begin(recipe)
    splits = splits_of(recipe, splits)
    start = starting_point(loaded, splits.train, reporter)
    check_steps(start.recipe, splits.train)
    teachers = load_teachers(start.loaded, splits.train.class_names, device, reporter)
    hooks = Hooks(before_step=_anneal, after_training=reestimate)
    run = resumed or NewRun(start.loaded, folder)
    network = start.network.to(device)
    job, progress = begin_job(run, network, splits, start.checkpoint, teachers, hooks, reporter)
    with under_way(job):
        fit(job, progress)
        best = summarize(job, progress, "binary")
    reporter.message(
        f"binary: top-1 {best.top1:.2f}% on {split_name(job, 'test')}, {best.n} images (epoch "
        f"{progress.best_epoch})"
    )
    return job.run


def _anneal(job: Job, share: float) -> None:
    """Set the temperature of the binary weights for the time after ``share`` of all steps."""
    schedule = job.recipe.schedule
    set_temperature(job.model, temperature_at(schedule.temperature, share, schedule.epochs))
