"""The last figure of a run: its best network on images that no choice depended on."""

from __future__ import annotations

from collections.abc import Iterable

from qat.checkpoints.format import load_checkpoint
from qat.checkpoints.loading import build
from qat.evaluation import Accuracy, evaluate, predictor
from qat.system.collectives import from_main
from qat.train.job import Job
from qat.train.progress import Progress


def measure_final(job: Job, progress: Progress) -> Accuracy | None:
    """Accuracy of the best checkpoint on ``job.splits.final``, which is told; ``None`` without that split.

    It is called by all processes alike.

    Raises:
        Stopped: SIGTERM came.
    """
    split = job.splits.final
    if split is None:
        return None
    from_main("")  # the first process has written the checkpoint
    network = build(load_checkpoint(job.run.best)).to(job.device)
    accuracy = evaluate(predictor(network), split, job.recipe.data, job.device, job.check_stop)
    job.reporter.message(
        f"epoch {progress.best_epoch} on {split_name(job, 'final')}, which no epoch was chosen on: top-1 "
        f"{accuracy.top1:.2f}% of {accuracy.n} images"
    )
    return accuracy


def split_name(job: Job, which: str) -> str:
    """What the split ``train``, ``test`` or ``final`` of a run is called."""
    split = getattr(job.splits, which)
    return str(split.name or job.recipe.data.evaluated_split)


def measured_on(job: Job, figures: Iterable[str]) -> dict[str, str]:
    """Which split each of the figures of a summary comes from."""
    found = dict.fromkeys(figures, split_name(job, "test"))
    return found if job.splits.final is None else found | {"final": split_name(job, "final")}
