"""Pretraining: a binary network is trained from random weights, or from those of a checkpoint."""

from __future__ import annotations

from qat.checkpoints.format import load_checkpoint
from qat.checkpoints.loading import architecture_of, load_state, without_quantizers
from qat.models.bnext import BNext, set_temperature
from qat.recipe.loading import LoadedRecipe, resolve_checkpoint
from qat.runs import RunDirectory
from qat.train.device import begin
from qat.train.job import Hooks, Job
from qat.train.loop import fit
from qat.train.optimizer import temperature_at
from qat.train.parallel import check_parallel
from qat.train.reporter import Reporter, SilentReporter
from qat.train.resume import NewRun, Resumed
from qat.train.setup import begin_job, for_task, reestimate, splits_of, summarize, under_way
from qat.train.teachers import load_teachers


def pretrain(
    loaded: LoadedRecipe, reporter: Reporter | None = None, resumed: Resumed | None = None
) -> RunDirectory:
    """Train a binary network, annealing the temperature of its weights until each is exactly ±1.

    Args:
        loaded: a recipe with ``task: pretrain``; for a resumed run, ``resumed.loaded``.
        reporter: is told about the progress; by default nothing is reported.
        resumed: the run to resume, from :func:`qat.train.resume.open_run`; by default a new run begins.

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
    splits = splits_of(recipe)
    model = BNext.from_architecture(architecture_of(recipe.model))
    start = None if recipe.model.checkpoint is None else resolve_checkpoint(loaded)
    if start is not None:
        load_state(model, without_quantizers(load_checkpoint(start, latent=recipe.model.latent)))
    model.to(device)
    teachers = load_teachers(loaded, splits.train.class_names, device, reporter)
    hooks = Hooks(before_step=_anneal, after_training=reestimate)
    run = resumed or NewRun(loaded)
    job, progress = begin_job(run, model, splits, start, teachers, hooks, reporter)
    with under_way(job):
        fit(job, progress)
        best = summarize(job, progress, "binary")
    reporter.message(f"binary: top-1 {best.top1:.2f}% of {best.n} images (epoch {progress.best_epoch})")
    return job.run


def _anneal(job: Job, share: float) -> None:
    """Set the temperature of the binary weights for the time after ``share`` of all steps."""
    schedule = job.recipe.schedule
    set_temperature(job.model, temperature_at(schedule.temperature, share, schedule.epochs))
