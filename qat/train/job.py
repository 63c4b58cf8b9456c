"""A training job: everything that the training loop works on and that doesn't change meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from qat.data.split import Split
from qat.errors import Stopped
from qat.evaluation import Accuracy, evaluate, predictor
from qat.models.bnext import BNext
from qat.recipe.schema import Recipe
from qat.runs import RunDirectory
from qat.system.collectives import any_process
from qat.system.sigterm import StopRequest
from qat.train.reporter import Reporter
from qat.train.resume import resume_command
from qat.train.state_file import NOTHING_SAVED, State
from qat.train.teachers import Teachers


class Splits(NamedTuple):
    """The images of a run.

    Attributes:
        train: those that it trains on.
        test: those that it is evaluated on, and its best epoch chosen on.
        final: those that the best epoch is measured on in the end; ``None`` where there are no others.
    """

    train: Split
    test: Split
    final: Split | None = None

    @property
    def notes(self) -> list[str]:
        """Sentences on what was held out, left out or left aside."""
        found = [split for split in self if split is not None]
        left_out = [split.left_out for split in found if split.left_out is not None]
        return [note for split in found for note in split.notes] + left_out


@dataclass(frozen=True)
class Hooks:
    """Functions by which a task changes the training loop. All processes call each of them alike.

    Attributes:
        before_step: called before each optimizer step and after the last step of each epoch, with the share
            of all steps that are done, from 0 to 1.
        after_training: called after the last step and before the last evaluation, with the network that is
            going to be saved. A sharded network is gathered before.
    """

    before_step: Callable[[Job, float], None] = lambda job, share: None
    after_training: Callable[[Job, BNext], None] = lambda job, network: None


@dataclass(frozen=True)
class Job:
    """Everything that the training loop works on.

    Several processes that train together have equal jobs, except for the shares of ``splits``.

    Attributes:
        recipe: the recipe as checkpoints store it, with paths as they were given.
        model: the network that is trained.
        splits: training and test images.
        device: device of the network.
        run: folder of the run.
        reporter: is told about the progress.
        provenance: see :func:`qat.train.provenance.provenance_of`; stored in the metadata of each checkpoint.
        teachers: teachers of the distillation; there may be none.
        hooks: functions of the task.
        state: the saved state to resume from; it has no tensors if the run begins.
        stop: notes SIGTERM.
        head_epochs: number of epochs at the beginning in which the classifier alone is trained.
    """

    recipe: Recipe
    model: BNext
    splits: Splits
    device: torch.device
    run: RunDirectory
    reporter: Reporter
    provenance: Mapping[str, str] = field(default_factory=dict)
    teachers: Teachers = field(default_factory=Teachers)
    hooks: Hooks = field(default_factory=Hooks)
    state: State = NOTHING_SAVED
    stop: StopRequest = field(default_factory=StopRequest)
    head_epochs: int = 0

    def check_stop(self) -> None:
        """Stop the training if SIGTERM has come to any of the processes, which must all call this alike.

        Raises:
            Stopped: SIGTERM has come.
        """
        if any_process(self.stop.requested):
            again = resume_command(self.recipe.task, self.run.whole)
            raise Stopped(f"stopped by SIGTERM, everything is saved; go on with: {again}")

    def evaluate(self, model: BNext) -> Accuracy:
        """Accuracy of ``model`` on the test images.

        Raises:
            Stopped: SIGTERM has come; this is checked before each batch.
        """
        data, device = self.recipe.data, self.device
        return evaluate(predictor(model), self.splits.test, data, device, self.check_stop)
