"""Exact resume: which runs may be resumed, and from where.

A resumed run ends with the same bytes as one that was never interrupted, on the CPU with the same number of
threads. Its state (:mod:`qat.train.capture`) holds the latent weights, every buffer, the optimizer, the
scheduler, and the sums of the epoch under way; with ``schedule.ema`` the averaged weights, in float16 the
scale of the gradients. The order of the images and their augmentation depend on seed, epoch and step alone.
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

#: Keys that may change when a run is resumed: results stay, or differ in their last bits, which is warned of.
NEUTRAL: Final = (
    "device",
    "threads",
    "parallel",
    "data.workers",
    "schedule.save_steps",
    "schedule.keep_states",
    "tracking.trackers",
    "tracking.project",
    "tracking.every",
)
#: Keys that name files. Their text may change, since it is the files' content that is compared.
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
        """What a message about the run's folder ends with: nothing."""
        return ""


@dataclass(frozen=True)
class Resumed:
    """A run that is resumed.

    Attributes:
        run: its folder.
        loaded: its recipe as ``recipe.yaml`` has it, with absolute paths.
        recipe: the same with paths as they were first given, which checkpoints repeat.
        state: where to go on; without tensors to begin again.
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
        """What a message about the run's folder ends with: from where the run goes on."""
        if not self.state.tensors:
            return ": begins again, nothing was saved"
        epoch, step = self.state.record.epoch, self.state.record.running.step
        steps = f" and {step} steps" if step else ""
        return f": goes on after {epoch} of {self.recipe.schedule.epochs} epochs{steps}"


def resume_command(task: str, run: Path) -> str:
    """The command line that resumes the run at ``run``."""
    return f"qat {task} --resume {shlex.quote(str(run))}"


def is_finished(run: Path) -> bool:
    """Whether the run at ``run`` has its summary."""
    return (run / SUMMARY).exists()


def open_run(path: Path, overrides: Sequence[str], reporter: Reporter) -> Resumed:
    """The unfinished run at ``path``, with the newest state that can be read.

    Args:
        path: its folder.
        overrides: ``key=value`` texts for keys of :data:`NEUTRAL`.
        reporter: warned of damaged states.

    Raises:
        RecipeError: the recipe can't be read, is not the one the run began with, or an override is not
            allowed.
        CheckpointError: a state is of a newer version.
        QatError: no such run.
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
    """Refuse to resume with other images or another checkpoint; warn of what can change the last bits.

    Args:
        state: where the run goes on.
        recipe: with which it goes on.
        provenance: of the run as it would go on.
        device: where the network lies.
        reporter: warned of another machine, versions, or number of processes.

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
    before, after = (json.loads(provenance.get("versions", "{}")) for provenance in (then, now))
    for name in sorted({*before, *after}):
        yield name, str(before.get(name)), str(after.get(name))


def _sharing(sharded: bool) -> str:
    return "FSDP" if sharded else "none"


def _s(name: str) -> str:
    return "s" if name.startswith("the checkpoint") else ""


def _differences(a: Recipe, b: Recipe, but: Sequence[str]) -> list[str]:
    """Keys, other than ``but``, that the recipes have different values for."""
    one, other = flat_recipe(a), flat_recipe(b)
    keys = dict.fromkeys([*one, *other])
    return [key for key in keys if key not in but and one.get(key) != other.get(key)]
