"""Reads the checkpoints that BNext's authors publish and that their training script writes.

There are three formats, all written by ``torch.save``: a state dict, a training checkpoint that holds a state
dict under ``state_dict``, and the state dict of the authors' quantized variant. Keys may have the prefix
``module.`` of data-parallel training. A safetensors file with such a state dict is read, too.

Unpickling is restricted to tensors and plain containers (``weights_only``). The authors' script stores
accuracies as NumPy numbers. These are rebuilt by the small stand-ins below, because NumPy's own functions
would rebuild any type of object that the file names.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors
import torch
from torch import Tensor

from qat.errors import CheckpointError

_PREFIX: Final = "module."
#: First bytes of the files of ``torch.save``: of zip files, and of the older pickles of protocol 2 or later.
_ZIP: Final = b"PK\x03\x04"
_PICKLE: Final = b"\x80"
#: Keys of the authors' quantizers. They are left out, since the authors' network never uses these values.
_UNUSED_KEYS: Final = re.compile(r".*_clip_val|fc\.scale")
#: Keys of a training checkpoint that are kept as facts about its run, where their values are numbers.
_RUN_FACTS: Final = ("epoch", "best_top1_acc", "temp", "alpha")


class _NumpyDtype:
    """Stand-in for ``numpy.dtype`` while unpickling. It accepts types of numbers and booleans only."""

    def __init__(self, name: str, *_: object) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[fiub][1248]", name):
            raise TypeError(f"NumPy type {name!r} is no number")
        self.name, self.byte_order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = ">" if state[1] == ">" else "<"


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> float | int | bool:
    """Stand-in for ``numpy.core.multiarray.scalar`` while unpickling. It returns a Python number."""
    value: float | int | bool = np.frombuffer(data, np.dtype(dtype.byte_order + dtype.name), count=1)[
        0
    ].item()
    return value


_STAND_INS: Final[list[Any]] = [
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]


def read_published(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read a state dict in one of the authors' formats.

    Args:
        path: file of ``torch.save`` (zip or the older pickle) or of safetensors.

    Returns:
        Two dictionaries. The first holds the tensors by key, without the prefix ``module.``, on the CPU and
        independent of the file. The second holds facts about them: ``format`` (``published weights``,
        ``published training checkpoint`` or ``published quantized``), ``dropped`` (the number of quantizer
        keys that were left out), and from a training checkpoint ``epoch``, ``best_top1_acc``, ``temp`` and
        ``alpha`` where they are numbers.

    Raises:
        CheckpointError: the file doesn't exist, is damaged, holds no tensors, or holds other objects than
            tensors, numbers, strings and containers. No code in the file is ever run.
    """
    content: Any = read_safetensors(path)[0] if is_safetensors(path) else _torch_load(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: found {type(content).__name__}, expected a state dict")
    info: dict[str, object] = {"format": "published weights"}
    if isinstance(content.get("state_dict"), Mapping):
        info["format"] = "published training checkpoint"
        info |= {key: fact for key in _RUN_FACTS if (fact := _number(content.get(key))) is not None}
        content = content["state_dict"]
    state = _without_prefix(path, {key: _plain_tensor(path, key, value) for key, value in content.items()})
    kept = {key: value for key, value in state.items() if not _UNUSED_KEYS.fullmatch(key)}
    if not kept:
        raise CheckpointError(f"{path}: holds no tensors of a network")
    info["dropped"] = len(state) - len(kept)
    if info["dropped"]:
        info["format"] = "published quantized"
    return kept, info


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


def _torch_load(path: Path) -> Any:
    start = b""
    try:
        with path.open("rb") as file:
            start = file.read(4)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS):
            # For old files torch warns about its own internals, which users can't change.
            warnings.simplefilter("ignore")
            # Mapping the file keeps the optimizer's state out of memory, which is twice as large as the
            # network.
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=True if start == _ZIP else None
            )
    # Damaged or crafted files make the unpickler raise KeyError, IndexError, RecursionError and many others.
    except Exception as error:
        raise CheckpointError(f"{path}: {_reason(error, start)}") from error


def _reason(error: Exception, start: bytes) -> str:
    # The unpickler would take even a text file for a pickle, and its message would explain nothing.
    if not start.startswith((_ZIP, _PICKLE)):
        return "not a checkpoint: it begins like neither a safetensors nor a torch file"
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"refused: it asks to unpickle {found[1]}, and only tensors, numbers and containers are read"
    # This message of torch spans many lines and advises to switch `weights_only` off.
    detail = "" if "weights_only" in str(error) else f": {_one_line(error)}"
    return f"not a readable checkpoint (torch.save or safetensors), or damaged{detail}"


def _one_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    # The first sentence is enough. It may quote bytes of the file, which must not control the terminal.
    text = "".join(c if c.isprintable() else "?" for c in text.split(". ")[0][:200])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _number(value: object) -> float | int | None:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return value if isinstance(value, int | float) else None


def _plain_tensor(path: Path, key: object, value: object) -> Tensor:
    if not isinstance(key, str) or not isinstance(value, Tensor):
        raise CheckpointError(
            f"{path}: not a state dict: {str(key)[:100]!r} holds no tensor but: {type(value).__name__}"
        )
    # A crafted file can describe a tensor that is far larger than its stored values.
    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {key[:100]!r}: expected a plain dense tensor")
    # Copied from the mapped file to memory, so that the file may change or be removed later.
    return value.detach().clone(memory_format=torch.contiguous_format)


def _without_prefix(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    while state and all(key.startswith(_PREFIX) for key in state):
        state = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    half = next((key for key in state if key.startswith(_PREFIX)), None)
    if half is not None:
        raise CheckpointError(
            f"{path}: some keys have the prefix {_PREFIX!r} and some don't, such as {half!r}"
        )
    return state
