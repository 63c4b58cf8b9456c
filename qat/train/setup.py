"""What pretraining and fine-tuning share around the loop: images, the job, the run's folder and summary."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from qat.data.augment import normalize
from qat.data.loading import check_fits, load_splits
from qat.data.split import Split
from qat.errors import DataError, RecipeError
from qat.evaluation import Accuracy
from qat.models.bnext import BNext
from qat.recipe.loading import LoadedRecipe
from qat.recipe.schema import Recipe
from qat.runs import SUMMARY
from qat.system.collectives import is_main, world
from qat.system.sigterm import StopRequest
from qat.train.batch_norm_reestimation import reestimate_batch_norm
from qat.train.capture import first_record
from qat.train.job import Hooks, Job, Splits
from qat.train.loop import step_count
from qat.train.precision import saves_no_time
from qat.train.progress import Progress
from qat.train.provenance import check_alike, provenance_of
from qat.train.reporter import Reporter
from qat.train.resume import NewRun, Resumed, check_same, resume_command
from qat.train.run_lock import held
from qat.train.sharding import shards
from qat.train.state_file import remove_states, write_state
from qat.train.teachers import Teachers
from qat.train.trackers import check_trackers, tracked


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


def splits_of(recipe: Recipe, given: Splits | None = None) -> Splits:
    """The training and the test images of a recipe, or those ``given``; this process's share of them.

    Raises:
        DataError: they can't be read, or do not fit the network.
        RecipeError: the processes can't share a batch evenly.
    """
    train, test = given or load_splits(recipe.data)
    classes = recipe.model.num_classes
    if classes not in (None, train.num_classes):
        raise DataError(
            f"the data has {train.num_classes} classes, the network {classes}; without model.num_classes the "
            "network has those of the data"
        )
    check_fits(test, train.num_classes)
    for split in (train, test):
        split.share = world().share
    if recipe.data.batch_size % world().size:
        raise RecipeError(
            f"data.batch_size: found {recipe.data.batch_size}, allowed with {world().size} processes, which "
            f"share it: a multiple of {world().size}"
        )
    return Splits(train, test)


def check_steps(recipe: Recipe, train: Split) -> None:
    """Refuse images that are too few for a single step of a run that trains.

    Raises:
        DataError: they are.
    """
    schedule = recipe.schedule
    if not schedule.epochs and not schedule.float_epochs:
        return
    if not train.batch_count(recipe.data.batch_size, drop_last=True):
        raise DataError(
            f"data.batch_size: {recipe.data.batch_size} is more than the {len(train)} training images"
        )
    if not step_count(recipe, train):
        raise DataError(
            f"schedule.accumulate: found {schedule.accumulate}, allowed: at most the "
            f"{train.batch_count(recipe.data.batch_size, drop_last=True)} batches of an epoch"
        )


def begin_job(
    run: NewRun | Resumed,
    model: BNext,
    splits: Splits,
    start: Path | None,
    teachers: Teachers,
    hooks: Hooks,
    reporter: Reporter,
) -> tuple[Job, Progress]:
    """The job of a run with its folder, and how far it is. The weights of ``model`` stay as they are.

    Args:
        run: begins, or is resumed.
        model: the network to train, on its device.
        splits: its images.
        start: the checkpoint that training starts from, if it does.
        teachers: of the distillation.
        hooks: of the task.
        reporter: told where the run lies and what is unusual about it.

    Raises:
        QatError: several processes see different files, the run can't be resumed with these images or this
            checkpoint, a tracker is missing, or the folder can't be made.
    """
    device = next(model.parameters()).device
    provenance = provenance_of(splits, start, teachers)
    check_alike(provenance, run.state.source)
    recipe = run.recipe
    check_trackers(recipe.tracking)
    slow = saves_no_time(recipe.precision, device)
    if slow is not None:
        reporter.warning(slow)
    if shards(recipe):
        reporter.message(f"FSDP: each of {world().size} processes keeps its part of the network")
    folder = run.open()
    reporter = tracked(reporter, recipe, folder, device)
    if run.state.tensors:
        check_same(run.state, recipe, provenance, device, reporter)
    reporter.message(f"{model.architecture}, run directory {folder.path}{run.news}")
    job = Job(
        recipe,
        model,
        splits,
        device,
        folder,
        reporter,
        provenance,
        teachers,
        hooks,
        run.state,
        StopRequest(patient=world().size > 1),
    )
    return job, Progress.of(run.state.record)


@contextmanager
def under_way(job: Job) -> Iterator[None]:
    """While entered, SIGTERM is noted and no other process can train in the run's folder.

    A keyboard interrupt says how to resume. A training that ends well needs its states no more, and they are
    removed.
    """
    path = job.run.path
    with held(job.run):
        try:
            with job.stop:
                if not job.state.tensors and is_main():
                    record = first_record(job.recipe, job.provenance, job.device)
                    write_state(path, record, {}, keep=1)
                yield
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"go on with: {resume_command(job.recipe.task, path)}") from error
        if is_main():
            remove_states(path)


def reestimate(job: Job, network: BNext) -> None:
    """Estimate the batch-norm statistics of ``network`` anew where the recipe asks for it; a hook."""
    count = job.recipe.schedule.reestimate_batch_norm
    if count:
        reestimate_batch_norm(
            network,
            lambda: calibration_pass(
                network, job.splits.train, job.recipe, job.device, job.check_stop, count
            ),
        )


def summarize(job: Job, progress: Progress, name: str) -> Accuracy:
    """Write the summary of a run that has ended, its best accuracy under ``name``, which is returned."""
    # Weights are binary after calibration and, as the schema demands, when the annealing has ended.
    assert progress.best is not None
    job.run.write_json(
        SUMMARY,
        {
            "task": job.recipe.task,
            "architecture": str(job.model.architecture),
            **{when: asdict(accuracy) for when, accuracy in progress.accuracies.items()},
            name: asdict(progress.best),
            "best_epoch": progress.best_epoch,
            "checkpoint": job.run.best.name,
            # Null where training started from random weights.
            "pretrained_sha256": job.provenance.get("pretrained_sha256"),
            "seconds": progress.seconds,
            "finished": time.time(),
            "data": {
                "train": job.provenance["train_fingerprint"],
                "test": job.provenance["test_fingerprint"],
            },
            "versions": json.loads(job.provenance["versions"]),
        },
    )
    return progress.best


def calibration_pass(
    model: BNext,
    train: Split,
    recipe: Recipe,
    device: torch.device,
    before_batch: Callable[[], None] = lambda: None,
    count: int | None = None,
) -> None:
    """Run some batches of training images, without augmentation, through ``model``.

    Their order depends on the seed alone.

    Args:
        model: in the mode in which the images should pass.
        train: the training images.
        recipe: says how many images are a batch, their size and normalization.
        device: where the network lies.
        before_batch: called before each batch, by all processes alike.
        count: number of batches; ``schedule.calibration_batches`` by default.
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
