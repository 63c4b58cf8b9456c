"""Exact resume: what of a training run is saved, how it is put back, and what may be resumed.

A resumed run ends with the same bytes as one that was never interrupted, on the CPU with the same number of
threads: its state holds the latent weights, every buffer, the optimizer, the scheduler, and the sums of the
epoch under way; where there are, the average of the weights and the scale of the gradients. The order of the
images and their augmentation depend on seed, epoch and step alone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from qat.errors import CheckpointError, OutputError, QatError, RecipeError
from qat.quantize.quantizers import activation_quantizers
from qat.recipe.loading import LoadedRecipe, load_recipe, parse_recipe
from qat.recipe.schema import Recipe
from qat.runs import SUMMARY, RunDirectory
from qat.system.collectives import is_main, world
from qat.train.sharding import part_like, shards, whole
from qat.train.state_file import FOLDER, LOCK, Record, State, newest_state, remove_leftovers
from qat.train.weight_average import WeightAverage

#: Keys that may change when a run goes on: they leave its result alone, or move last bits, which is said.
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
#: Keys whose text may change since what they name is compared by its content.
_PATHS: Final = ("model.checkpoint", "data.root", "distillation.teachers")


class Listener(Protocol):
    """Who is told what is unusual about a run that goes on."""

    def warning(self, text: str) -> None:
        """Something the user should know."""


@dataclass(frozen=True)
class Resumed:
    """A run that goes on.

    Attributes:
        run: its folder.
        loaded: its recipe as ``recipe.yaml`` has it, with absolute paths.
        recipe: the same as it was first given, which checkpoints repeat.
        state: where to go on; ``None`` to begin again.
    """

    run: RunDirectory
    loaded: LoadedRecipe
    recipe: Recipe
    state: State | None


@dataclass
class Parts:
    """What a state is taken of and put back into."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    device: torch.device
    average: WeightAverage | None = None
    scaler: torch.amp.GradScaler | None = None

    @cached_property
    def names(self) -> list[str]:
        """Name of each parameter by the optimizer's index."""
        known = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = self.optimizer.param_groups
        return [known[id(parameter)] for group in groups for parameter in group["params"]]


def resume_command(task: str, run: Path) -> str:
    """The command line that goes on with the run at ``run``."""
    return f"qat {task} --resume {shlex.quote(str(run))}"


def is_finished(run: Path) -> bool:
    """Whether the run at ``run`` has its summary."""
    return (run / SUMMARY).exists()


def open_run(path: Path, overrides: Sequence[str], listener: Listener) -> Resumed:
    """The unfinished run at ``path``, with the newest state that can be read.

    Args:
        path: its folder.
        overrides: ``key=value`` texts for keys of :data:`NEUTRAL`.
        listener: told of damaged states.

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
            f"--set {changed[0]}: cannot change when a run goes on; allowed are {', '.join(NEUTRAL)}"
        )
    recipe = loaded.recipe
    state = newest_state(path, listener.warning)
    if state is not None:
        recipe = parse_recipe(state.record.recipe, str(state.source))
        if changed := _differences(recipe, loaded.recipe, (*NEUTRAL, *_PATHS)):
            raise RecipeError(
                f"{written}: not the recipe of {state.source}: {', '.join(changed)} differ"
                f"{'s' if len(changed) == 1 else ''}; a run goes on with the recipe it began with"
            )
        recipe = _with(recipe, {key: _value(loaded.recipe, key) for key in NEUTRAL})
        if not state.tensors:
            state = None
    return Resumed(RunDirectory(path), loaded, recipe, state)


def check_same(
    state: State, recipe: Recipe, facts: Mapping[str, str], device: torch.device, listener: Listener
) -> None:
    """Refuse to go on with other data or another checkpoint than ``state`` is of; warn of what moves bits.

    Raises:
        CheckpointError: they differ.
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
        if facts.get(key) != record.facts.get(key):
            raise CheckpointError(f"{state.source}: of another run: {name} differ{_s(name)} ({key})")
    threads = torch.get_num_threads()
    changes = [
        f"{name} was {then}, is {now}"
        for name, then, now in (
            ("the number of processes", record.processes, world().size),
            ("the sharing of the network", _sharing(record.sharded), _sharing(shards(recipe))),
            ("the number of threads", record.threads, threads),
            ("the device", record.device, device.type),
            *_versions(record.facts, facts),
        )
        if then != now
    ]
    if changes:
        listener.warning(
            f"{'; '.join(changes)}: the result can differ from an uninterrupted run's in its last bits"
        )


def capture(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors that training depends on, on the CPU, and the record's fields about the rest.

    The tensors are to be written before training goes on: where they can be, they are the ones in use. Of a
    network in parts they are gathered, for which all processes call this; the first alone is given them.
    """
    tensors = {f"model/{key}": value for key, value in parts.model.state_dict().items()}
    saved = parts.optimizer.state_dict()
    for index, values in saved["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{key}/{parts.names[index]}"] = value
    if parts.average is not None:
        weights = parts.average.network.named_parameters()  # the rest of it is the model's
        tensors |= {f"average/{key}": value for key, value in weights}
    tensors["random/cpu"] = torch.get_rng_state()
    if parts.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(parts.device)
    copies: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        gathered = whole(value)
        if not is_main():
            continue
        kept = gathered.cpu().contiguous()
        # Parts of one storage can't be written beside each other.
        own = kept.untyped_storage().nbytes() == kept.nbytes and kept.data_ptr() not in storages
        copies[key] = kept if own else kept.clone()
        storages.add(kept.data_ptr())
    points = activation_quantizers(parts.model)
    return copies, {
        "scheduler": parts.scheduler.state_dict(),
        "scaler": {} if parts.scaler is None else parts.scaler.state_dict(),
        "learning_rates": [float(group["lr"]) for group in saved["param_groups"]],
        "quantizers": {name: (point.calibrated, point.observing) for name, point in points},
    }


def restore(parts: Parts, state: State) -> None:
    """Put back what :func:`capture` took; ``state`` gives its tensors away, which would stay in memory.

    Raises:
        CheckpointError: it is of another network or optimizer.
    """
    record = state.record
    kinds: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}, "random": {}}
    parameters = dict(parts.model.named_parameters())
    for key, value in state.tensors.items():
        kind, _, name = key.partition("/")
        if kind != "random":
            of = name.partition("/")[2] if kind == "optimizer" else name
            # To the device first: torch's observers take over loaded tensors as they are.
            value = part_like(value, parameters.get(of)).to(parts.device)
        kinds[kind][name] = value
    points = dict(activation_quantizers(parts.model))
    groups = parts.optimizer.state_dict()["param_groups"]
    moments: dict[int, dict[str, Tensor]] = {}
    try:
        parts.model.load_state_dict(kinds["model"], strict=True)
        for name, value in kinds["optimizer"].items():
            key, _, parameter = name.partition("/")
            moments.setdefault(parts.names.index(parameter), {})[key] = value
        for group, rate in zip(groups, record.learning_rates, strict=True):
            group["lr"] = rate
        parts.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        parts.scheduler.load_state_dict(record.scheduler)
        for name, (calibrated, observing) in record.quantizers.items():
            points[name].calibrated, points[name].observing = calibrated, observing
        if parts.average is not None:
            parts.average.network.load_state_dict(kinds["model"] | kinds["average"], strict=True)
            parts.average.follow(parts.model)
        if parts.scaler is not None:
            parts.scaler.load_state_dict(record.scaler)
        torch.set_rng_state(kinds["random"]["cpu"])
        if parts.device.type == "cuda" and "cuda" in kinds["random"]:
            torch.cuda.set_rng_state(kinds["random"]["cuda"], parts.device)
        state.tensors.clear()
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{state.source}: does not fit the run: {error}") from error


@contextmanager
def held(run: RunDirectory) -> Iterator[None]:
    """Keep other trainings out of the same run; remove what a killed one left half written.

    Of several processes that train together the first one does it.

    Raises:
        OutputError: one does already, or the folder can't be written.
    """
    if not is_main():
        yield
        return
    try:
        import fcntl
    except ImportError:  # not on Windows; two processes there have to be kept apart by their user
        yield
        return
    path = run.path / FOLDER / LOCK
    try:
        path.parent.mkdir(exist_ok=True)
        lock = path.open("w", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    with lock:
        try:
            # A record lock: it ends with this process, and loaders that outlive it don't inherit it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise OutputError(f"{run.path}: another process is training in this run") from error
        except OSError:  # a file system without locks
            pass
        remove_leftovers(run.path)
        yield


def begun(recipe: Recipe, facts: Mapping[str, str], device: torch.device) -> Record:
    """The record of a run that has just begun."""
    return Record(
        recipe=recipe.model_dump(mode="json"),
        facts=dict(facts),
        threads=torch.get_num_threads(),
        processes=world().size,
        sharded=shards(recipe),
        device=device.type,
    )


def _versions(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    before, after = (json.loads(facts.get("versions", "{}")) for facts in (then, now))
    for name in sorted({*before, *after}):
        yield name, str(before.get(name)), str(after.get(name))


def _sharing(sharded: bool) -> str:
    return "FSDP" if sharded else "none"


def _s(name: str) -> str:
    return "s" if name.startswith("the checkpoint") else ""


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differences(a: Recipe, b: Recipe, but: Sequence[str]) -> list[str]:
    one, other = (dict(_flat(recipe.model_dump(mode="json"))) for recipe in (a, b))
    keys = dict.fromkeys([*one, *other])
    return [key for key in keys if key not in but and one.get(key) != other.get(key)]


def _value(recipe: Recipe, key: str) -> object:
    return dict(_flat(recipe.model_dump(mode="json")))[key]


def _with(recipe: Recipe, values: Mapping[str, object]) -> Recipe:
    content = recipe.model_dump(mode="json")
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (content[section] if section else content)[name] = value
    return Recipe.model_validate(content)
