"""Saved states of a training run under ``state/``: what one holds, written whole, read back checked.

A state is a safetensors file: tensors, and a JSON text with everything else. Reading one runs no code. Both
are covered by a SHA-256; a state that is damaged is passed over for the one before it. File names tell the
position: ``00002-0000150.safetensors`` was written after 2 whole epochs and 150 steps of the third.
``begun.safetensors`` has no tensors; it keeps the recipe as it was given until the first state is written.
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
#: Locked by the process that trains in a run, see :func:`qat.train.run_lock.held`.
LOCK: Final = "lock"
FORMAT: Final = "bnext-qat-state"
FORMAT_VERSION: Final = 1
_BEGUN: Final = "begun.safetensors"
_NAME: Final = re.compile(r"(\d{5,})-(\d{7,})\.safetensors")
_Count = Annotated[int, Field(ge=0)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")


class Running(_Strict):
    """The epoch under way: steps done, and the sums that its metrics are made of."""

    step: _Count = 0
    seen: _Count = 0
    correct: _Count = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    learning_rate: float = 0.0


class Record(_Strict):
    """Everything in a state except its tensors. The names of the fields are the keys of the JSON text.

    Attributes:
        recipe: the run's, as it was given: paths are not resolved.
        facts: the run's provenance: versions, fingerprints of the images, SHA-256 of the checkpoint it
            started from.
        threads, processes, device: what it was computed with; threads of each process.
        sharded: whether each process had only its part of the network (FSDP).
        epoch: whole epochs, evaluated.
        running: the epoch after these.
        rows: metrics of the whole epochs.
        accuracy: after the last of these.
        best, best_epoch: best of the epochs before the last one, and of that one, too, once ``running`` has
            begun.
        accuracies: before training, by name.
        seconds: that the run took so far.
        scheduler: state of the learning-rate scheduler.
        scaler: state of the gradient scaler; empty where gradients are not scaled.
        learning_rates: of the optimizer's groups.
        quantizers: of each activation quantizer, whether it is calibrated, and whether it observes.
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
    """A saved state, read from the file ``source``. One without tensors tells which run it belongs to, and
    nothing to resume from.
    """

    record: Record
    tensors: dict[str, Tensor]
    source: Path


#: The state of a run of which nothing is saved.
NOTHING_SAVED: Final = State(Record(recipe={}, facts={}, threads=0, device=""), {}, Path("no state"))


def write_state(run: Path, record: Record, tensors: dict[str, Tensor], keep: int) -> None:
    """Save a state of the run at ``run``, then remove all but the newest ``keep``.

    Args:
        run: folder of the run.
        record: everything else.
        tensors: on the CPU, contiguous, none sharing memory; none at all where training has not begun.
        keep: 1 or more. States of later positions are removed, too: a run has those if it was resumed from an
            earlier state because they were damaged.

    Raises:
        OutputError: it cannot be written.
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
        except safetensors.SafetensorError as error:  # a full disk, say
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
    """The newest state of the run at ``run`` that can be read; ``None`` if there is none.

    Args:
        run: folder of the run.
        warn: told of each damaged state passed over.

    Raises:
        CheckpointError: a state is of a newer version of this package.
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
    """Remove every state of a finished run. Files of other names stay, and so does what can't be removed."""
    folder = run / FOLDER
    try:
        for path in (*(path for _, path in _saved(run)), folder / _BEGUN, folder / LOCK):
            path.unlink(missing_ok=True)
        folder.rmdir()
    except OSError:  # they are of no use any more, and do no harm
        return


def remove_leftovers(run: Path) -> None:
    """Remove the half-written files that a killed process left in the run's folder."""
    for folder in (run, run / FOLDER):
        for path in folder.glob(".*.tmp"):
            if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
                path.unlink(missing_ok=True)


class _DamagedError(Exception):
    pass


def _saved(run: Path) -> Iterator[tuple[tuple[int, int], Path]]:
    for path in (run / FOLDER).glob("*.safetensors"):
        if found := _NAME.fullmatch(path.name):
            yield (int(found[1]), int(found[2])), path


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{tensors_hash(tensors)}\n{text}".encode()).hexdigest()


def _read(path: Path) -> State:
    try:
        tensors, metadata = read_safetensors(path)
        text = metadata.get(FORMAT, "")
        whole = metadata.get("sha256") == _digest(text, tensors)
    except (CheckpointError, RuntimeError, TypeError) as error:  # the last two: types that can't be hashed
        raise _DamagedError(first_line(error).removeprefix(f"{path}: ")) from error
    if not whole:
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
