"""How far a training run is: what changes while the rest of a job stays as it is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from qat.evaluation import Accuracy
from qat.train.state_file import Record, Running


@dataclass
class Progress:
    """Epochs behind a run, and the best of them.

    Attributes:
        epoch: whole epochs, each of them evaluated.
        running: the epoch after these.
        rows: metrics of the whole epochs.
        accuracy: after the last of these, or after calibration; ``None`` before there was an evaluation.
        best, best_epoch: of the epochs so far, with 0 for the network before training.
        accuracies: of evaluations before training, by name.
        seconds_before: seconds that the run had taken before it was resumed.
        started: when this process began with it, in seconds since 1970.
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
        """The progress that a saved state's ``record`` tells of."""
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
        """What the run took so far, without the time between a stop and a resumption."""
        return self.seconds_before + time.time() - self.started

    def fields(self) -> dict[str, Any]:
        """The fields of a :class:`~qat.train.state_file.Record` that :meth:`of` reads."""
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
        """Whether ``accuracy`` is better than the best: a higher top-1, or as high with a lower loss."""
        best = self.best
        return best is None or (accuracy.top1, -accuracy.loss) > (best.top1, -best.loss)
