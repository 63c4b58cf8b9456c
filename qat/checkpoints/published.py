"""Reads checkpoints that other code wrote: BNext's authors', and what people train with.

A state dict of BNext alone or among other things (:mod:`qat.checkpoints.network_search`), in a file of
``torch.save`` (:mod:`qat.checkpoints.torch_files`) or in a safetensors file. The authors publish bare state
dicts; their training script writes one under ``state_dict``; and their quantized variant has further keys,
which carry nothing. No code in a file is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors
from torch import Tensor

from qat.checkpoints.network_search import find_network, refuse_model
from qat.checkpoints.pickle_values import StandIn, TensorRecord, is_tensor, kind_of
from qat.checkpoints.tensor_checks import listed
from qat.checkpoints.torch_files import PICKLE, ZIP, TorchFile, read_torch_file
from qat.errors import CheckpointError

#: State of the authors' quantizers. Their clip values are never used, and neither is the scale.
_CARRIES_NOTHING: Final = re.compile(r".*_clip_val|fc\.scale")
#: What a training checkpoint tells about its run; optimizer state and lists are left out.
_RUN_FACTS: Final = ("epoch", "best_top1_acc", "temp", "alpha")


@dataclass(frozen=True)
class Published:
    """A network's weights from a file that other code wrote.

    Attributes:
        state: the tensors as they are stored, by the network's own keys, on the CPU and independent of the
            file.
        format: ``published weights``, ``published training checkpoint`` or ``published quantized``.
        facts: ``dropped`` (number of quantizer keys left out), and from a training checkpoint ``epoch``,
            ``best_top1_acc``, ``temp`` and ``alpha`` where they are numbers.
        notes: what was chosen or left out, in words, for the user to read.
    """

    state: dict[str, Tensor]
    format: str
    facts: dict[str, float | int]
    notes: tuple[str, ...] = ()


def read_published(path: Path, state_key: str | None = None) -> Published:
    """Read the state dict of a BNext.

    Args:
        path: file of ``torch.save`` (zip or legacy) or safetensors.
        state_key: which one to take of several; see :func:`qat.checkpoints.network_search.find_network`.

    Raises:
        CheckpointError: the file is absent or damaged, or holds no tensors of a network.
    """
    file = None if is_safetensors(path) else _torch_file(path)
    content: Any = read_safetensors(path)[0] if file is None else file.content
    try:
        if not isinstance(content, Mapping) or (isinstance(content, StandIn) and not content):
            refuse_model(content)
            found = listed([kind_of(content)[:100]])
            raise CheckpointError(f"found {found}, expected a state dict")
        network = find_network(content, state_key)
        kept = {}
        for key, value in network.entries.items():
            if not isinstance(key, str) or not is_tensor(value):
                raise CheckpointError(
                    f"not a state dict: {listed([str(key)[:100]])!r} holds no tensor but: "
                    f"{listed([kind_of(value)[:100]])}"
                )
            if not _CARRIES_NOTHING.fullmatch(key):
                kept[key] = value
        if not kept:
            raise CheckpointError("holds no tensors of a network")
        state = kept if file is None else file.tensors(kept)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    facts: dict[str, float | int] = {"dropped": len(network.entries) - len(kept)}
    kind = "published weights"
    if network.place:
        kind = "published training checkpoint"
        facts |= {key: fact for key in _RUN_FACTS if (fact := _number(content.get(key), file)) is not None}
    if facts["dropped"]:
        kind = "published quantized"
    return Published(state, kind, facts, network.notes)


def is_safetensors(path: Path) -> bool:
    """Whether ``path`` is a safetensors file: by its ending, or by its start (8 bytes, then a JSON object).

    Raises:
        CheckpointError: the file doesn't exist, is empty, is not a regular file, or can't be read.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise CheckpointError(f"{path}: is {kind}; expected a checkpoint")
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not start:
        raise CheckpointError(f"{path}: is empty")
    return start[8:] == b"{" or path.suffix == ".safetensors"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. The tensors are copies, so the file may change afterwards.

    Raises:
        CheckpointError: the file is damaged or cut short.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, dict(file.metadata() or {})
    # Mostly SafetensorError, but a damaged header can also name a type that torch doesn't have.
    except Exception as error:
        raise CheckpointError(f"{path}: damaged or cut short safetensors file: {_one_line(error)}") from error


def _torch_file(path: Path) -> TorchFile:
    start = b""
    try:
        with path.open("rb") as file:
            start = file.read(len(ZIP))
        # Any text is a pickle of sorts, and what can be said of one as such explains nothing.
        if not start.startswith((ZIP, PICKLE)):
            raise CheckpointError("not a checkpoint: it begins like neither a safetensors nor a torch file")
        return read_torch_file(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # Hostile bytes raise nearly anything: KeyError, IndexError, RecursionError, zipfile.BadZipFile, …
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint (torch.save or safetensors), or damaged: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    # The first sentence is enough. It may quote bytes of the file, which must not control the terminal.
    text = "".join(c if c.isprintable() else "?" for c in text.split(". ")[0][:200])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _number(value: object, file: TorchFile | None) -> float | int | None:
    if isinstance(value, TensorRecord) and file is not None and value.shape in ((), (1,)):
        (value,) = file.tensors({"": value}).values()
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, int):  # one too long to print is no fact of a run
        return value if abs(value) < 2**63 else None
    return value if isinstance(value, float) else None
