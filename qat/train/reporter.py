"""The interface by which a training run reports its progress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Reporter(Protocol):
    """Is told how a training run goes: messages, warnings, and metrics after each step and epoch."""

    def message(self, text: str) -> None:
        """Take one line of news for the user."""

    def warning(self, text: str) -> None:
        """Take a warning about something that the user may want to change."""

    def start(self, epochs: int, steps: int, done: int = 0) -> None:
        """Called before the first step.

        Args:
            epochs: number of epochs in the whole run.
            steps: optimizer steps of an epoch.
            done: optimizer steps that a resumed run has done before.
        """

    def step(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Called after each optimizer step.

        Args:
            epoch: number of the epoch, from 1.
            metrics: ``loss``, ``top1`` (percent) and ``images_per_second``, each averaged over the epoch so
                far; the ``learning_rate`` of this step; and ``step``, its number over all epochs, from 1.
        """

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Called after an epoch is evaluated. ``metrics`` is its line of ``metrics.jsonl``."""

    def stop(self) -> None:
        """Called after the last step, also if an exception ended the training."""


class SilentReporter:
    """A :class:`Reporter` that ignores everything."""

    def message(self, text: str) -> None:
        """Ignored."""

    def warning(self, text: str) -> None:
        """Ignored."""

    def start(self, epochs: int, steps: int, done: int = 0) -> None:
        """Ignored."""

    def step(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Ignored."""

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Ignored."""

    def stop(self) -> None:
        """Ignored."""
