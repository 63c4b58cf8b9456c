"""Saves what a run keeps while it trains: states to resume from, the last checkpoint and the best one."""

from __future__ import annotations

from qat.checkpoints.format import save_checkpoint
from qat.errors import CheckpointError, TrainingError
from qat.models.bnext import BNext, is_binary
from qat.runs import RunDirectory
from qat.system.collectives import is_main
from qat.train.capture import Parts, capture, first_record
from qat.train.job import Job
from qat.train.progress import Progress
from qat.train.sharding import is_sharded, whole_network
from qat.train.state_file import write_state


def save_state(job: Job, progress: Progress, parts: Parts) -> None:
    """Write a state from which the run can be resumed. All processes call this; the first one writes.

    Raises:
        OutputError: the state can't be written.
    """
    main = is_main()
    if not (main or is_sharded(parts.model)):  # each process has the same state, which the first one writes
        return
    tensors, fields = capture(parts)
    if not main:  # this process was only needed to send its parts of the tensors
        return
    record = first_record(job.recipe, job.provenance, job.device)
    record = record.model_copy(update={**progress.fields(), **fields})
    write_state(job.run.path, record, tensors, job.recipe.schedule.keep_states)


def keep_checkpoints(job: Job, progress: Progress, kept: BNext) -> None:
    """Write the checkpoint of the last whole epoch, also as the best one if its accuracy is the best so far.

    A network whose weights are not binary yet can't be the best. Within an epoch, and before the first
    evaluation, nothing is written.

    Args:
        job: says where the checkpoint is written and how.
        progress: its best epoch is updated.
        kept: the network that was evaluated. If it is sharded, this process's part of it.

    Raises:
        TrainingError: a tensor holds NaN, or a value too large for the type in which it is stored.
        OutputError: the run directory can't be written.
    """
    accuracy = progress.accuracy
    if accuracy is None or progress.running.step:
        return
    targets = [job.run.last]
    if progress.improves(accuracy) and is_binary(kept):
        progress.best, progress.best_epoch = accuracy, progress.epoch
        targets.append(job.run.best)
    network = whole_network(kept)
    metadata = {**job.provenance, "epoch": str(progress.epoch), "accuracy": accuracy.to_json()}
    recipe = job.recipe
    for path in targets if is_main() else ():
        try:
            save_checkpoint(
                path, network, recipe=recipe, metadata=metadata, float_dtype=recipe.output.float_weights
            )
        except CheckpointError as error:  # the training went wrong, not the user's input
            raise TrainingError(f"epoch {progress.epoch}: {error}; {last_good(job.run)}") from error


def last_good(run: RunDirectory) -> str:
    """A message that names the last checkpoint of ``run``, for errors of its training."""
    if run.last.exists():
        return f"the last good checkpoint is {run.last}"
    return "no checkpoint was written yet"
