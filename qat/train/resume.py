"""Exact resume: which runs may be resumed, and from which state.

On the CPU, with the same number of threads, a resumed run ends with the same bytes as one that was never
interrupted. Its state (:mod:`qat.train.capture`) holds the latent weights, every buffer, the optimizer, the
scheduler, and the sums of the epoch that was interrupted; with ``schedule.ema`` also the averaged weights,
and with float16 the scale of the gradients. The order of the images and their augmentation needn't be saved,
since they depend on nothing but seed, epoch and step.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from qat.errors import CheckpointError, QatError, RecipeError
from qat.recipe.dotted_keys import flat_recipe, with_values
from qat.recipe.loading import LoadedRecipe, load_recipe, parse_recipe
from qat.recipe.schema import Recipe
from qat.runs import SUMMARY, RunDirectory
from qat.system.collectives import world
from qat.train.reporter import Reporter
from qat.train.sharding import shards
from qat.train.state_file import NOTHING_SAVED, State, newest_state

#: Keys that may change when a run is resumed. The results stay the same, or differ in their last bits, in
#: which case there is a warning.
NEUTRAL: Final = (
    "device",
    "threads",
    "parallel",
    "data.workers",
    "data.on_error",
    "schedule.save_steps",
    "schedule.keep_states",
    "tracking.trackers",
    "tracking.project",
    "tracking.every",
)
#: Keys that name files. Their values may change, because the content of the files is compared instead.
_PATHS: Final = ("model.checkpoint", "data.root", "distillation.teachers")


class NewRun:
    """A run that begins, with the interface of :class:`Resumed`."""

    state: State = NOTHING_SAVED

    def __init__(self, loaded: LoadedRecipe, folder: Path | None = None) -> None:
        """Take the recipe, and the folder if it is not to be chosen; it is made by :meth:`open`."""
        self._loaded, self._folder = loaded, folder
        self.recipe = loaded.recipe

    def open(self) -> RunDirectory:
        """Make the run's folder.

        Raises:
            QatError: see :meth:`qat.runs.RunDirectory.create`.
        """
        return RunDirectory.create(self._loaded, self._folder)

    @property
    def news(self) -> str:
        """End of the message that names the run's folder: an empty string."""
        return ""


@dataclass(frozen=True)
class Resumed:
    """A run that is resumed.

    Attributes:
        run: folder of the run.
        loaded: the recipe in ``recipe.yaml``, which has absolute paths.
        recipe: the same recipe with paths as they were given first, which checkpoints store.
        state: the saved state to resume from; it has no tensors if the run begins again.
    """

    run: RunDirectory
    loaded: LoadedRecipe
    recipe: Recipe
    state: State

    def open(self) -> RunDirectory:
        """The run's folder."""
        return self.run

    @property
    def news(self) -> str:
        """End of the message that names the run's folder: how much of the run is done."""
        if not self.state.tensors:
            return ": begins again, nothing was saved"
        epoch, step = self.state.record.epoch, self.state.record.running.step
        steps = f" and {step} steps" if step else ""
        return f": goes on after {epoch} of {self.recipe.schedule.epochs} epochs{steps}"


def resume_command(task: str, run: Path) -> str:
    """The command line that resumes the run at ``run``."""
    return f"qat {task} --resume {shlex.quote(str(run))}"


def is_finished(run: Path) -> bool:
    """Whether the run in the folder ``run`` has a summary, which a run writes at its end."""
    return (run / SUMMARY).exists()


def open_run(path: Path, overrides: Sequence[str], reporter: Reporter) -> Resumed:
    """Open an unfinished run with the newest of its states that can be read.

    Args:
        path: folder of the run.
        overrides: texts ``key=value`` for keys in :data:`NEUTRAL`.
        reporter: is warned of damaged states.

    Raises:
        RecipeError: the recipe can't be read, is not the one that the run began with, or an override changes
            a key that may not change.
        CheckpointError: a state was written by a newer version of this package.
        QatError: there is no run in that folder.
    """
    if not path.is_dir():
        raise QatError(f"{path}: no such run directory")
    written = path / "recipe.yaml"
    if not written.is_file():
        raise QatError(f"{path}: not a run directory (it has no recipe.yaml); start the training anew")
    before = load_recipe(written).recipe
    loaded = load_recipe(written, overrides)
    if changed := _differences(before, loaded.recipe, NEUTRAL):
        raise RecipeError(
            f"--set {changed[0]}: cannot change when a run goes on; allowed are {', '.join(NEUTRAL)}. With "
            f"others a new run begins: qat {before.task} {shlex.quote(str(written))} --set {changed[0]}=…"
        )
    state = newest_state(path, reporter.warning)
    if state is None:
        return Resumed(RunDirectory(path), loaded, loaded.recipe, NOTHING_SAVED)
    recipe = parse_recipe(state.record.recipe, str(state.source))
    if changed := _differences(recipe, loaded.recipe, (*NEUTRAL, *_PATHS)):
        raise RecipeError(
            f"{written}: not the recipe of {state.source}: {', '.join(changed)} differ"
            f"{'s' if len(changed) == 1 else ''}; a run goes on with the recipe it began with"
        )
    now = flat_recipe(loaded.recipe)
    recipe = with_values(recipe, {key: now[key] for key in NEUTRAL})
    return Resumed(RunDirectory(path), loaded, recipe, state if state.tensors else NOTHING_SAVED)


def check_same(
    state: State, recipe: Recipe, provenance: Mapping[str, str], device: torch.device, reporter: Reporter
) -> None:
    """Check that a run is resumed with the same images and checkpoints, and warn of other differences.

    Args:
        state: the saved state to resume from.
        recipe: the recipe of the resumed run.
        provenance: the provenance of the resumed run.
        device: device of the network.
        reporter: is warned if versions, device, threads or processes differ, which can change the last bits
            of the result.

    Raises:
        CheckpointError: images, checkpoint or teachers are not those of ``state``.
    """
    record = state.record
    what = {
        "train_fingerprint": "the training images",
        "test_fingerprint": "the test images",
        "class_names": "the names of the classes",
        "pretrained_sha256": "the checkpoint to start from",
        "teachers_sha256": "the weights of the teachers",
    }
    for key, name in what.items():
        if provenance.get(key) != record.facts.get(key):
            raise CheckpointError(f"{state.source}: of another run: {name} differ{_s(name)} ({key})")
    threads = torch.get_num_threads()
    changes = [
        f"{name} was {then}, is {now}"
        for name, then, now in (
            ("the number of processes", record.processes, world().size),
            ("the sharing of the network", _sharing(record.sharded), _sharing(shards(recipe))),
            ("the number of threads", record.threads, threads),
            ("the device", record.device, device.type),
            *_versions(record.facts, provenance),
        )
        if then != now
    ]
    if changes:
        reporter.warning(
            f"{'; '.join(changes)}: the result can differ from an uninterrupted run's in its last bits"
        )


def _versions(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield the name of each package with its version in both provenances."""
    before, after = (json.loads(provenance.get("versions", "{}")) for provenance in (then, now))
    for name in sorted({*before, *after}):
        yield name, str(before.get(name)), str(after.get(name))


def _sharing(sharded: bool) -> str:
    return "FSDP" if sharded else "none"


def _s(name: str) -> str:
    """The ending of the verb after ``name``, of which the checkpoint alone is singular."""
    return "s" if name.startswith("the checkpoint") else ""


def _differences(a: Recipe, b: Recipe, but: Sequence[str]) -> list[str]:
    """Keys for which the recipes have different values, except those in ``but``."""
    one, other = flat_recipe(a), flat_recipe(b)
    keys = dict.fromkeys([*one, *other])
    return [key for key in keys if key not in but and one.get(key) != other.get(key)]
