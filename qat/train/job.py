"""A training job: everything that the loop works on and that stays as it is."""

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
    """The images of a run: those it trains on, and those it is evaluated on."""

    train: Split
    test: Split


@dataclass(frozen=True)
class Hooks:
    """What a task adds to the loop. Each hook is called by all processes alike.

    Attributes:
        before_step: called before each optimizer step, with the share of all steps that are done, and after
            the last step of each epoch.
        after_training: called after the last step and before the last evaluation with the network that is
            going to be kept, whole.
    """

    before_step: Callable[[Job, float], None] = lambda job, share: None
    after_training: Callable[[Job, BNext], None] = lambda job, network: None


@dataclass(frozen=True)
class Job:
    """Everything the loop works on. Each of several processes has a job, equal but for ``splits``' shares.

    Attributes:
        recipe: as checkpoints repeat it.
        model: the network that trains.
        splits: training and test images.
        device: where the network lies.
        run: folder of the run.
        reporter: told about progress.
        provenance: what the results are made of; part of each checkpoint's metadata.
        teachers: none, where the labels alone teach.
        hooks: what the task adds.
        state: where to go on; without tensors for a run that begins.
        stop: whether SIGTERM has come.
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

    def check_stop(self) -> None:
        """Raise ``Stopped`` where SIGTERM reached any of the processes, which all call this alike."""
        if any_process(self.stop.requested):
            again = resume_command(self.recipe.task, self.run.path)
            raise Stopped(f"stopped by SIGTERM, everything is saved; go on with: {again}")

    def evaluate(self, model: BNext) -> Accuracy:
        """Accuracy of ``model`` on the test images.

        Raises:
            Stopped: SIGTERM came; raised between two batches.
        """
        data, device = self.recipe.data, self.device
        return evaluate(predictor(model), self.splits.test, data, device, self.check_stop)
