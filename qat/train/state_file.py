"""The saved states of a training run, in the folder ``state/`` of its run directory.

A state is a safetensors file with tensors, and a JSON text with everything else. Reading one runs no code. A
SHA-256 covers both. If a state is damaged, the one before it is used. File names say when a state was
written: ``00002-0000150.safetensors`` after 2 whole epochs and 150 steps of the third. ``begun.safetensors``
has no tensors; it stores the recipe as it was given until the first state is written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import pydantic
import safetensors
import safetensors.torch
from pydantic import Field
from torch import Tensor

from qat.checkpoints.format import tensors_hash
from qat.checkpoints.published import read_safetensors
from qat.errors import CheckpointError, OutputError, first_line
from qat.evaluation import Accuracy
from qat.system.files import replacing

FOLDER: Final = "state"
#: Locked by the process that trains in a run, see :func:`qat.train.run_lock.locked`.
LOCK: Final = "lock"
FORMAT: Final = "bnext-qat-state"
FORMAT_VERSION: Final = 1
_BEGUN: Final = "begun.safetensors"
_NAME: Final = re.compile(r"(\d{5,})-(\d{7,})\.safetensors")
_Count = Annotated[int, Field(ge=0)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")


class Running(_Strict):
    """Sums over the steps that are done of the current epoch, from which its metrics are computed.

    Attributes:
        step: number of optimizer steps that are done.
        seen: number of images.
        correct: number of images that were classified right.
        loss_sum: sum of the loss over the images.
        seconds: time that the steps took.
        learning_rate: learning rate of the last step.
    """

    step: _Count = 0
    seen: _Count = 0
    correct: _Count = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    learning_rate: float = 0.0


class Record(_Strict):
    """Everything in a state except its tensors. The names of the fields are the keys of the JSON text.

    Attributes:
        format_version: version of the format that the state was written in.
        recipe: recipe of the run, with paths as they were given.
        facts: provenance of the run: versions, fingerprints of the images, SHA-256 of the checkpoint that it
            started from.
        threads: number of threads in each process.
        processes: number of processes.
        sharded: whether each process had only its part of the network (FSDP).
        device: type of the device, such as ``cpu``.
        epoch: number of whole epochs, each of which was evaluated.
        running: steps and sums of the epoch after these.
        rows: metrics of the whole epochs.
        accuracy: accuracy after the last whole epoch.
        best, best_epoch: the best accuracy and its epoch. The last whole epoch is only taken into account
            once a step of the next one is done.
        accuracies: accuracies of evaluations before training, by name.
        seconds: seconds that the run has taken so far.
        scheduler: state of the learning-rate scheduler.
        scaler: state of the gradient scaler; empty if gradients are not scaled.
        learning_rates: learning rate of each parameter group of the optimizer.
        quantizers: for each activation quantizer, whether it is calibrated and whether it observes.
    """

    format_version: int = FORMAT_VERSION
    recipe: dict[str, Any]
    facts: dict[str, str]
    threads: int
    processes: int = 1
    sharded: bool = False
    device: str
    epoch: _Count = 0
    running: Running = Running()
    rows: list[dict[str, Any]] = []
    accuracy: Accuracy | None = None
    best: Accuracy | None = None
    best_epoch: int | None = None
    accuracies: dict[str, Accuracy] = {}
    seconds: float = 0.0
    scheduler: dict[str, Any] = {}
    scaler: dict[str, Any] = {}
    learning_rates: list[float] = []
    quantizers: dict[str, tuple[bool, bool]] = {}


@dataclass(frozen=True)
class State:
    """A saved state of a run.

    Attributes:
        record: everything but the tensors.
        tensors: the tensors by key. There are none if training has not begun; then the state only has the
            recipe and the provenance of the run.
        source: file that the state was read from.
    """

    record: Record
    tensors: dict[str, Tensor]
    source: Path


#: The state of a run that has saved nothing yet.
NOTHING_SAVED: Final = State(Record(recipe={}, facts={}, threads=0, device=""), {}, Path("no state"))


def write_state(run: Path, record: Record, tensors: dict[str, Tensor], keep: int) -> None:
    """Save a state of a run, then remove all states but the newest ones.

    States after the position of this one are removed, too. They exist if they were damaged and the run was
    resumed from an earlier state.

    Args:
        run: folder of the run.
        record: everything but the tensors.
        tensors: contiguous tensors on the CPU that don't share memory; empty if training has not begun.
        keep: number of states that are kept, at least 1.

    Raises:
        OutputError: the state can't be written.
    """
    text = record.model_dump_json()
    metadata = {FORMAT: text, "sha256": _digest(text, tensors)}
    here = record.epoch, record.running.step
    name = f"{here[0]:05}-{here[1]:07}.safetensors" if tensors else _BEGUN
    path = run / FOLDER / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:  # for example, the disk is full
            raise OutputError(f"{path}: cannot be written: {first_line(error)}") from error
    if not tensors:
        return
    saved = sorted((position, path) for position, path in _saved(run) if position <= here)
    kept = {path for _, path in saved[-keep:]}
    try:
        for _, path in _saved(run):
            if path not in kept:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{run / FOLDER}: {error.strerror or error}") from error


def newest_state(run: Path, warn: Callable[[str], None]) -> State | None:
    """The newest state of a run that can be read; ``None`` if there is none.

    Args:
        run: folder of the run.
        warn: called with a message for each damaged state.

    Raises:
        CheckpointError: a state was written by a newer version of this package.
    """
    paths = [path for _, path in sorted(_saved(run), reverse=True)]
    for path in [*paths, run / FOLDER / _BEGUN]:
        if path.exists():
            try:
                return _read(path)
            except _DamagedError as error:
                warn(f"{path}: {error}; going back to the state before it")
    return None


def remove_states(run: Path) -> None:
    """Remove the states of a finished run. Other files stay, and so do states that can't be removed."""
    folder = run / FOLDER
    try:
        for path in (*(path for _, path in _saved(run)), folder / _BEGUN, folder / LOCK):
            path.unlink(missing_ok=True)
        folder.rmdir()
    except OSError:  # states that stay are useless, but do no harm
        return


def remove_leftovers(run: Path) -> None:
    """Remove the temporary files that a killed process left in the run's folder."""
    for folder in (run, run / FOLDER):
        for path in folder.glob(".*.tmp"):
            if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
                path.unlink(missing_ok=True)


class _DamagedError(Exception):
    """A state is damaged; the message says how."""


def _saved(run: Path) -> Iterator[tuple[tuple[int, int], Path]]:
    """Yield the position (epochs, steps) and the path of each state with tensors."""
    for path in (run / FOLDER).glob("*.safetensors"):
        if found := _NAME.fullmatch(path.name):
            yield (int(found[1]), int(found[2])), path


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the tensors and the JSON text, in hexadecimal digits."""
    return hashlib.sha256(f"{tensors_hash(tensors)}\n{text}".encode()).hexdigest()


def _read(path: Path) -> State:
    try:
        tensors, metadata = read_safetensors(path)
        text = metadata.get(FORMAT, "")
        intact = metadata.get("sha256") == _digest(text, tensors)
    # RuntimeError and TypeError come from tensors of types that can't be hashed.
    except (CheckpointError, RuntimeError, TypeError) as error:
        raise _DamagedError(first_line(error).removeprefix(f"{path}: ")) from error
    if not intact:
        raise _DamagedError("damaged: its SHA-256 is not the recorded one")
    found = re.search(r'"format_version":(\d{1,9})', text)
    if found and int(found[1]) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {found[1]}; this version of bnext-qat reads up to {FORMAT_VERSION}"
        )
    try:
        return State(Record.model_validate_json(text), tensors, path)
    except pydantic.ValidationError as error:
        raise _DamagedError(f"not a state: {first_line(error)}") from error
