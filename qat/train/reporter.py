"""What a training run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Reporter(Protocol):
    """Is told how a training run goes: news, warnings, and its figures after each step and epoch."""

    def message(self, text: str) -> None:
        """One line of news."""

    def warning(self, text: str) -> None:
        """Something the user should know and may want to change."""

    def start(self, epochs: int, steps: int, done: int = 0) -> None:
        """The steps begin.

        Args:
            epochs: of the whole run.
            steps: optimizer steps of an epoch.
            done: optimizer steps that lie behind a run that is resumed.
        """

    def step(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """One optimizer step is done.

        Args:
            epoch: its number, from 1.
            metrics: ``loss``, ``top1`` (percent) and ``images_per_second``, means over the epoch so far;
                ``learning_rate`` of this step, and ``step``, its number counted over all epochs.
        """

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """One epoch is done and evaluated; ``metrics`` is its line of ``metrics.jsonl``."""

    def stop(self) -> None:
        """The steps are over, whether they ended well or not."""


class SilentReporter:
    """A :class:`Reporter` that says nothing."""

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
