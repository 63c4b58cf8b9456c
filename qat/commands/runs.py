"""What `qat runs` does: list the runs in a folder, and compare some of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat.errors import QatError
from qat.recipe.dotted_keys import flat_recipe
from qat.recipe.loading import load_recipe
from qat.recipe.schema import Recipe
from qat.runs import RunDirectory, find_run

#: Keys that name places: two runs differ in them without being different.
_PLACES = ("output.dir",)


@dataclass(frozen=True)
class Listed:
    """A run in a list.

    Attributes:
        path: its folder.
        task: ``pretrain`` or ``finetune``; empty where the recipe can't be read.
        state: ``finished``, ``unfinished`` or ``damaged``.
        float_top1: of the float-rest network, in percent.
        top1: of the best checkpoint, in percent.
        best_epoch: the epoch that this is of, 0 before training.
        finished: when, as local time; empty where it has not finished.
    """

    path: str
    task: str
    state: str
    float_top1: float | None
    top1: float | None
    best_epoch: int | None
    finished: str

    def row(self) -> tuple[str, ...]:
        """Texts for a table."""
        accuracies = ("" if one is None else f"{one:.2f} %" for one in (self.float_top1, self.top1))
        epoch = "" if self.best_epoch is None else str(self.best_epoch)
        return (self.path, self.task, self.state, *accuracies, epoch, self.finished)


HEADINGS = ("run", "task", "state", "float rest", "top-1", "best epoch", "finished")


def list_runs(root: Path) -> list[Listed]:
    """The runs in the folder ``root``, those that finished last at the end.

    Raises:
        QatError: there is no such folder.
    """
    if not root.is_dir():
        raise QatError(f"{root}: no such folder; runs lie where output.dir was (name it with --runs)")
    found = [_listed(path.parent) for path in root.glob("*/recipe.yaml")]
    return sorted(found, key=lambda one: (one.finished or "9", one.path))


@dataclass(frozen=True)
class Difference:
    """A key or figure, and its text for each run."""

    key: str
    values: tuple[str, ...]


def compare_runs(paths: Sequence[Path]) -> tuple[list[Listed], list[Difference]]:
    """Some runs, and the keys of their recipes that differ.

    Raises:
        QatError: one of them is no run, or its recipe can't be read.
    """
    for path in paths:
        find_run(path)
    recipes = [flat_recipe(_recipe(path)) for path in paths]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in _PLACES)
    differences = [
        Difference(key, values)
        for key in keys
        if len(set(values := tuple(str(recipe.get(key, "—")) for recipe in recipes))) > 1
    ]
    return [_listed(path) for path in paths], differences


def to_dict(runs: Sequence[Listed], differences: Sequence[Difference] = ()) -> dict[str, Any]:
    """For JSON."""
    return {
        "runs": [asdict(one) for one in runs],
        "differences": {one.key: list(one.values) for one in differences},
    }


def _recipe(path: Path) -> Recipe:
    return load_recipe(path / "recipe.yaml").recipe


def _listed(path: Path) -> Listed:
    run = RunDirectory(path)
    try:
        task = _recipe(path).task
    except QatError:
        return Listed(str(path), "", "damaged", None, None, None, "")
    try:
        summary = run.summary()
    except QatError:
        state = "damaged" if (path / "summary.json").exists() else "unfinished"
        return Listed(str(path), task, state, None, None, None, "")
    best = summary.get("int8" if task == "finetune" else "binary")
    when = summary.get("finished")
    moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(when)) if isinstance(when, float) else ""
    epoch = summary.get("best_epoch")
    return Listed(
        str(path),
        task,
        "finished",
        _top1(summary.get("float")),
        _top1(best),
        epoch if isinstance(epoch, int) else None,
        moment,
    )


def _top1(accuracy: object) -> float | None:
    found = accuracy.get("top1") if isinstance(accuracy, dict) else None
    return float(found) if isinstance(found, int | float) else None
