"""Progress of a training run: a live bar on a terminal, one line per epoch elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ConsoleReporter:
    """A :class:`qat.train.reporter.Reporter` that writes to ``console``."""

    def __init__(self, console: Console) -> None:
        """Take the console to write to."""
        self.console = console
        self.progress: Progress | None = None
        self._task: TaskID | None = None
        self._epochs = 0

    def message(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def warning(self, text: str) -> None:
        """Print one line, marked as a warning."""
        self.console.print(f"warning: {text}", style="yellow", highlight=False, soft_wrap=True, markup=False)

    def start(self, epochs: int, steps: int, done: int = 0) -> None:
        """Show the bar if the console is a terminal; ``done`` of all ``epochs * steps`` steps are done."""
        self._epochs = epochs
        if not self.console.is_terminal or not epochs:
            return
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self.progress.add_task(
            f"epoch 1/{epochs}", total=epochs * steps, completed=done, figures=""
        )
        self.progress.start()

    def step(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Move the bar by one batch."""
        if self.progress is not None and self._task is not None:
            figures = "loss {loss:.4f}  top-1 {top1:.2f}%  {images_per_second:.0f} images/s".format(**metrics)
            self.progress.update(
                self._task, advance=1, description=f"epoch {epoch}/{self._epochs}", figures=figures
            )

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Print the line of one epoch: loss, accuracies (percent), speed, seconds, and T while it anneals."""
        line = (
            f"epoch {metrics['epoch']}/{self._epochs}  loss {metrics['loss']:.4f}  "
            f"top-1 {metrics['top1']:.2f}%  test loss {metrics['test_loss']:.4f}  "
            f"test top-1 {metrics['test_top1']:.2f}%  "
            f"{metrics['images_per_second']:.0f} images/s  {metrics['seconds']:.0f} s"
        )
        if metrics["temperature"] >= 1e-7:
            line += f"  temperature {metrics['temperature']:.1e}"
        self.message(line)

    def stop(self) -> None:
        """Remove the bar."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
