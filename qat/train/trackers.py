"""Sends the metrics of a run to experiment trackers, in addition to its `metrics.jsonl`.

All trackers that accelerate supports can be used. Those that write files write them to ``tracking/`` in the
run's folder. Steps are optimizer steps counted over all epochs, so that a resumed run continues its curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from qat import __version__
from qat.errors import RecipeError, first_line, nearest
from qat.recipe.dotted_keys import flat_recipe
from qat.recipe.schema import Recipe, Tracking
from qat.runs import RunDirectory
from qat.system.collectives import is_main
from qat.train.parallel import accelerator
from qat.train.reporter import Reporter

_FOLDER: Final = "tracking"
#: Metrics of a step that are sent to trackers.
_STEP: Final = ("loss", "top1", "learning_rate", "images_per_second")
#: Names of packages that differ from the names of their trackers, by tracker.
_PACKAGES: Final = {"comet_ml": "comet-ml"}


def check_trackers(tracking: Tracking) -> None:
    """Check that accelerate supports the recipe's trackers and that they are installed.

    Raises:
        RecipeError: a tracker is unknown or not installed; the message names the first one.
    """
    if not tracking.trackers:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    usable = set(map(str, get_available_trackers()))
    for name in tracking.trackers:
        if name not in known:
            raise RecipeError(
                f"tracking.trackers: found {name!r}, allowed: {', '.join(known)}{nearest(name, known)}"
            )
        if name not in usable:
            package = "bnext-qat[tensorboard]" if name == "tensorboard" else _PACKAGES.get(name, name)
            raise RecipeError(
                f"tracking.trackers: {name!r} is not installed here; install it with: pip install '{package}'"
            )


def tracked(reporter: Reporter, recipe: Recipe, run: RunDirectory, device: torch.device) -> Reporter:
    """A reporter that passes everything on to ``reporter``, and metrics to the recipe's trackers, too.

    It is ``reporter`` itself if there are no trackers, and in all processes but the first, which alone sends
    metrics.
    """
    return _Tracked(reporter, recipe, run, device) if recipe.tracking.trackers and is_main() else reporter


class _Tracked:
    """Passes everything on to a reporter, and metrics to trackers, too.

    A tracker that raises an exception is not used any more, and the training goes on.
    """

    def __init__(self, reporter: Reporter, recipe: Recipe, run: RunDirectory, device: torch.device) -> None:
        self._reporter, self._recipe, self._run, self._device = reporter, recipe, run, device
        self._trackers: list[Any] = []
        self._steps = 0
        self.message, self.warning = reporter.message, reporter.warning

    def start(self, epochs: int, steps: int, done: int = 0) -> None:
        """Start the trackers. In a resumed run they discard the points that they have after step ``done``.

        Raises:
            RecipeError: a tracker can't be started.
        """
        self._steps = steps
        engine = accelerator(self._device, log_with=self._recipe.tracking.trackers, project_dir=self._folder)
        try:
            self._folder.mkdir(exist_ok=True)
            engine.init_trackers(
                self._recipe.tracking.project,
                config=None if done else _hyperparameters(self._recipe),
                init_kwargs=_options(self._run.path.name, done),
            )
            self._trackers = list(engine.trackers)
        except (
            Exception
        ) as error:  # trackers raise various exceptions: no connection, no account, a full disk
            raise RecipeError(
                f"tracking.trackers: {', '.join(self._recipe.tracking.trackers)}: cannot be started: "
                f"{first_line(error)}"
            ) from error
        self._reporter.start(epochs, steps, done)

    @property
    def _folder(self) -> Path:
        return self._run.path / _FOLDER

    def step(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of every ``tracking.every``-th step."""
        self._reporter.step(epoch, metrics)
        number = int(metrics["step"])
        if number % self._recipe.tracking.every == 0:
            self._send({f"train/{key}": metrics[key] for key in _STEP}, number)

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Send the epoch's metrics, as a point at its last step."""
        self._reporter.epoch(metrics)
        values = {
            key.replace("test_", "test/") if key.startswith("test_") else f"epoch/{key}": value
            for key, value in metrics.items()
            if key != "epoch"
        }
        self._send({"epoch/number": metrics["epoch"], **values}, metrics["epoch"] * self._steps)

    def stop(self) -> None:
        """Let the trackers finish."""
        self._reporter.stop()
        for tracker in self._trackers:
            self._guarded(tracker, tracker.finish)
        self._trackers = []

    def _send(self, values: dict[str, float], step: int) -> None:
        for tracker in list(self._trackers):
            self._guarded(tracker, tracker.log, values, step=step)

    def _guarded(self, tracker: Any, action: Any, *values: Any, **options: Any) -> None:
        try:
            action(*values, **options)
        except Exception as error:  # trackers raise various exceptions
            self._trackers = [one for one in self._trackers if one is not tracker]
            self.warning(f"tracking: {tracker.name} fails, training goes on without: {first_line(error)}")


def _hyperparameters(recipe: Recipe) -> dict[str, str | int | float | bool]:
    """Every value of the recipe by its dotted key. Values of types that trackers don't take become texts."""
    return {"version": __version__} | {
        key: value if isinstance(value, str | int | float | bool) else str(value)
        for key, value in flat_recipe(recipe).items()
    }


def _options(run: str, done: int) -> dict[str, dict[str, Any]]:
    """Options for some trackers: the name of the run, and how to resume it after ``done`` steps."""
    return {
        "tensorboard": {"purge_step": done + 1} if done else {},
        "wandb": {"name": run, "id": run, "resume": "allow"},
        "mlflow": {"run_name": run},
    }
