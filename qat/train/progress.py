"""How far a training run is. In contrast to the job, it changes while the run trains."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from qat.evaluation import Accuracy
from qat.train.state_file import Record, Running


@dataclass
class Progress:
    """The epochs that a run has done, and the best of them.

    Attributes:
        epoch: number of whole epochs, each of which was evaluated.
        running: steps and sums of the epoch after these.
        rows: metrics of the whole epochs.
        accuracy: accuracy after the last whole epoch, or after calibration; ``None`` before any evaluation.
        best: best accuracy so far.
        best_epoch: the epoch with the best accuracy; 0 is the network before training.
        accuracies: accuracies of evaluations before training, by name.
        seconds_before: seconds that the run had taken before it was resumed.
        started: when this process began the run or resumed it, in seconds since 1970.
    """

    epoch: int = 0
    running: Running = field(default_factory=Running)
    rows: list[dict[str, Any]] = field(default_factory=list)
    accuracy: Accuracy | None = None
    best: Accuracy | None = None
    best_epoch: int | None = None
    accuracies: dict[str, Accuracy] = field(default_factory=dict)
    seconds_before: float = 0.0
    started: float = field(default_factory=time.time)

    @classmethod
    def of(cls, record: Record) -> Progress:
        """The progress that the ``record`` of a saved state holds."""
        return cls(
            epoch=record.epoch,
            running=record.running.model_copy(),
            rows=list(record.rows),
            accuracy=record.accuracy,
            best=record.best,
            best_epoch=record.best_epoch,
            accuracies=dict(record.accuracies),
            seconds_before=record.seconds,
        )

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far, without the time for which it was interrupted."""
        return self.seconds_before + time.time() - self.started

    def fields(self) -> dict[str, Any]:
        """The values that :meth:`of` reads from a :class:`~qat.train.state_file.Record`, by field."""
        return {
            "epoch": self.epoch,
            "running": self.running,
            "rows": self.rows,
            "accuracy": self.accuracy,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "accuracies": self.accuracies,
            "seconds": self.seconds,
        }

    def improves(self, accuracy: Accuracy) -> bool:
        """Whether ``accuracy`` is the best so far: it has a higher top-1, or the same with a lower loss."""
        best = self.best
        return best is None or (accuracy.top1, -accuracy.loss) > (best.top1, -best.loss)
