"""Steps around the training loop that pretraining and fine-tuning share: images, job, run folder, summary."""

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
from qat.data.loading import check_fits, load_for_training
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
from qat.train.final import measure_final, measured_on
from qat.train.job import Hooks, Job, Splits
from qat.train.loop import step_count
from qat.train.precision import saves_no_time
from qat.train.progress import Progress
from qat.train.provenance import check_alike, provenance_of
from qat.train.reporter import Reporter
from qat.train.resume import NewRun, Resumed, check_same, resume_command
from qat.train.run_lock import locked
from qat.train.sharding import shards
from qat.train.state_file import remove_states, write_state
from qat.train.teachers import Teachers
from qat.train.trackers import check_trackers, tracked


def for_task(loaded: LoadedRecipe, task: str, command: str | None = None) -> Recipe:
    """The recipe, after a check that it is for ``task``.

    Args:
        loaded: the recipe.
        task: ``pretrain`` or ``finetune``.
        command: name of the `qat` command for the message; by default ``task``.

    Raises:
        RecipeError: the recipe is for another task.
    """
    if loaded.recipe.task != task:
        raise RecipeError(
            f"{loaded.path}: task: this recipe is for `qat {loaded.recipe.task}`, not `qat {command or task}`"
        )
    return loaded.recipe


def splits_of(recipe: Recipe, given: Splits | None = None) -> Splits:
    """The training and test images of a recipe, or those ``given``; each process gets its share.

    Raises:
        DataError: the images can't be read, or have another number of classes than the network.
        RecipeError: the batch size is not a multiple of the number of processes.
    """
    train, test, final = splits = given or Splits(*load_for_training(recipe.data))
    classes = recipe.model.num_classes
    if classes not in (None, train.num_classes):
        raise DataError(
            f"the data has {train.num_classes} classes, the network {classes}; without model.num_classes the "
            "network has those of the data"
        )
    for split in filter(None, (test, final)):
        check_fits(split, train.num_classes)
    for split in filter(None, splits):
        split.share = world().share
    if recipe.data.batch_size % world().size:
        raise RecipeError(
            f"data.batch_size: found {recipe.data.batch_size}, allowed with {world().size} processes, which "
            f"share it: a multiple of {world().size}"
        )
    return splits


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
    """Make or open the folder of a run, and return its job and its progress.

    The weights of ``model`` don't change: the training loop restores those of a resumed run.

    Args:
        run: a new run, or one that is resumed.
        model: the network to train, on its device.
        splits: training and test images.
        start: the checkpoint that training starts from; ``None`` if it starts from random weights.
        teachers: teachers of the distillation.
        hooks: functions of the task.
        reporter: is told where the run's folder is, and warned of unusual settings.

    Raises:
        QatError: several processes read different files, the run can't be resumed with these images or this
            checkpoint, a tracker is not installed, or the folder can't be made.
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
    for note in splits.notes:
        reporter.message(note)
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
    """Context for a training, in which SIGTERM is noted and no other training can use the run's folder.

    A keyboard interrupt gets a message that says how to resume. After a training that finished, its states
    are removed, because they are not needed any more.
    """
    path = job.run.path
    with locked(job.run):
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
    """Re-estimate the batch-norm statistics of ``network`` if the recipe asks for it. This is a hook.

    Raises:
        QatError: see :func:`qat.train.batch_norm_reestimation.reestimate_batch_norm`.
    """
    count = job.recipe.schedule.reestimate_batch_norm
    if count:
        reestimate_batch_norm(
            network,
            lambda: calibration_pass(
                network, job.splits.train, job.recipe, job.device, job.check_stop, count
            ),
        )


def summarize(job: Job, progress: Progress, name: str) -> Accuracy:
    """Write the summary of a finished run, with its best accuracy under the key ``name``.

    Returns:
        The best accuracy.
    """
    # There is a best epoch, which needs binary weights: fine-tuning starts with them, and the schema makes
    # sure that the temperature of a pretraining falls far enough.
    assert progress.best is not None
    final = measure_final(job, progress)
    job.run.write_json(
        SUMMARY,
        {
            "task": job.recipe.task,
            "architecture": str(job.model.architecture),
            **{when: asdict(accuracy) for when, accuracy in progress.accuracies.items()},
            name: asdict(progress.best),
            **({} if final is None else {"final": asdict(final)}),
            "measured_on": measured_on(job, [*progress.accuracies, name]),
            "best_epoch": progress.best_epoch,
            "checkpoint": job.run.best.name,
            # Null if training started from random weights.
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
    """Run batches of training images through ``model`` without augmentation.

    The order of the images depends on nothing but the seed.

    Args:
        model: the network, in training or evaluation mode as the caller needs it.
        train: the training images.
        recipe: says the batch size, the image size and the normalization.
        device: device of the network.
        before_batch: called before each batch, by all processes alike.
        count: number of batches; by default ``schedule.calibration_batches``.
    """
    batches = train.batches(recipe.data.batch_size, shuffle_seed=recipe.seed)
    count = recipe.schedule.calibration_batches if count is None else count
    for _, (images, _) in zip(range(count), batches, strict=False):
        before_batch()
        if images.shape[-1] != recipe.data.image_size:  # larger images are loaded for a random crop
            images = _centre(images, recipe.data.image_size)
        model(normalize(images.to(device), recipe.data.mean, recipe.data.std))


def _centre(images: Tensor, side: int) -> Tensor:
    """The centre of images (N, 3, H, W), cropped to (N, 3, side, side)."""
    top, left = ((length - side) // 2 for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]
