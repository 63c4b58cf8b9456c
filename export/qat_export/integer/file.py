"""Integer networks as files: safetensors, no pickle, no torch to write or to read one.

The tensors are the arrays of the description under dotted names such as ``blocks.3.spatial.conv.sign_bits``,
of the types and shapes that :mod:`qat_export.integer.network` states. All other fields are in one JSON text
under the metadata key :data:`FORMAT`::

    {"format_version": 1, "network": {...}, "sha256": "...", "versions": {"bnext-qat": "..."}}

``network`` is the tree of :func:`qat_export.integer.fields.to_tree`: what is an array in the description is
that array's digest there. ``sha256`` is that of the text without ``sha256`` itself. So every bit of a file
that means anything is covered, tensors one by one. Equal networks are equal files.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from qat import __version__
from qat.errors import CheckpointError, QuantizationError
from qat.system.files import write_atomically
from qat_export.integer.consistency import check_network
from qat_export.integer.fields import from_tree, named_arrays, to_tree
from qat_export.integer.network import IntegerNetwork

FORMAT: Final = "bnext-qat integer network"
FORMAT_VERSION: Final = 1


def save_network(network: IntegerNetwork, path: Path) -> None:
    """Write ``network`` to ``path``, atomically; equal networks give equal bytes.

    Args:
        network: what :func:`qat_export.lowering.network.lower` gives; it is not changed.
        path: file to create or replace.

    Raises:
        CheckpointError: the network is not consistent, or a field is not of the type that the description
            states: :func:`load_network` would refuse it.
        OutputError: ``path`` cannot be written.
    """
    # safetensors takes memory as it lies there, and would scramble what is not contiguous.
    arrays = {
        name: np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        for name, array in named_arrays(network)
    }
    tree = to_tree(network)
    try:
        check_network(from_tree(IntegerNetwork, tree, dict(arrays)))
    except (CheckpointError, QuantizationError) as error:
        raise CheckpointError(f"{path}: not written: {error}") from error
    header = {"format_version": FORMAT_VERSION, "network": tree, "versions": {"bnext-qat": __version__}}
    text = _text(header | {"sha256": _sha256(header)})
    # All metadata under one key: safetensors keeps several in no fixed order.
    write_atomically(path, safetensors.numpy.save(arrays, {FORMAT: text}))


def load_network(path: Path) -> IntegerNetwork:
    """Read a network that :func:`save_network` wrote; every field is as it was, bit for bit.

    Args:
        path: file to read; the network doesn't depend on it afterwards.

    Raises:
        CheckpointError: the file is absent, damaged, cut short, of another kind or a newer version, or what
            it describes is not consistent; the message names the file and the tensor or field.
    """
    arrays, metadata = _read(path)
    try:
        if FORMAT not in metadata:
            raise CheckpointError(f"not an integer network: its metadata has no key {FORMAT!r}")
        tree = _network_tree(metadata[FORMAT])
        network: IntegerNetwork = from_tree(IntegerNetwork, tree, arrays)
        if arrays:
            raise CheckpointError(
                f"{min(arrays)!r}: a tensor of this name belongs to no field of the network"
            )
        check_network(network)
    except (CheckpointError, QuantizationError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return network


def _read(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    try:
        if not path.is_file():
            kind = "not a regular file" if path.exists() else "no such file"
            raise CheckpointError(f"{path}: {kind}")
        with safetensors.safe_open(path, framework="np") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, dict(file.metadata() or {})
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except CheckpointError:
        raise
    # A damaged header is a SafetensorError; a type that NumPy lacks gives errors of several other classes.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        reason = "".join(c if c.isprintable() else "?" for c in reason)
        raise CheckpointError(f"{path}: not a safetensors file, damaged or cut short: {reason}") from error


def _network_tree(text: str) -> object:
    """The network's part of the metadata, once its version and its digest are found to be right."""
    try:
        header = json.loads(text, parse_constant=_finite, parse_float=_finite)
        recorded = header.pop("sha256", None) if isinstance(header, dict) else None
        found = _sha256(header)
    except (ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"its metadata is not JSON: {reason}") from error
    version = header.get("format_version") if isinstance(header, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError("its metadata has no format version")
    # Before anything else: a newer version may have other keys and another digest.
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"has format version {str(version)[:20]}; "
            f"this bnext-qat {__version__} reads up to {FORMAT_VERSION}"
        )
    if recorded != found:
        raise CheckpointError(
            f"its metadata is damaged: its SHA-256 is {found[:12]}…, {str(recorded)[:12]!r}… was recorded"
        )
    if "network" not in header:
        raise CheckpointError("its metadata has no network")
    return header["network"]


def _text(header: Any) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _sha256(header: Any) -> str:
    return hashlib.sha256(_text(header).encode()).hexdigest()


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number
