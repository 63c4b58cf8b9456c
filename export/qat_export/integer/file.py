"""Integer networks as safetensors files, written and read without pickle and without torch.

The tensors are the arrays of the network under dotted names such as ``blocks.3.spatial.conv.sign_bits``, with
the types and shapes that :mod:`qat_export.integer.network` gives. All other fields are in one JSON text under
the metadata key :data:`FORMAT`::

    {"format_version": 1, "network": {...}, "sha256": "...", "versions": {"bnext-qat": "..."}}

``network`` is the tree of :func:`qat_export.integer.fields.to_tree`, in which each array is replaced by its
digest. ``sha256`` is the digest of the text without ``sha256`` itself. So a change of any tensor or field is
found. Equal networks give equal files.
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
    """Write ``network`` to ``path`` atomically; equal networks give equal bytes.

    Args:
        network: the network, such as :func:`qat_export.lowering.network.lower` returns.
        path: file to create or replace.

    Raises:
        CheckpointError: :func:`load_network` would refuse the network, since it is not consistent or a field
            has another type than its annotation.
        OutputError: ``path`` cannot be written.
    """
    # safetensors writes an array's memory as it is, which is wrong for arrays that are not contiguous.
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
    # All metadata under one key, since safetensors writes several keys in no fixed order.
    write_atomically(path, safetensors.numpy.save(arrays, {FORMAT: text}))


def load_network(path: Path) -> IntegerNetwork:
    """Read a network that :func:`save_network` wrote. Every field is the same, bit for bit.

    Args:
        path: file to read; it is not needed any more afterwards.

    Raises:
        CheckpointError: the file is absent, damaged, cut short, of another kind or of a newer version, or its
            network is not consistent; the message names the file and the tensor or field.
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
    # A damaged header raises SafetensorError, a type that NumPy lacks one of several other classes.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        reason = "".join(c if c.isprintable() else "?" for c in reason)
        raise CheckpointError(f"{path}: not a safetensors file, damaged or cut short: {reason}") from error


def _network_tree(text: str) -> object:
    """The tree of the network in the metadata ``text``, whose version and digest are checked."""
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
    # Check the version first, since a newer one may have other keys and another digest.
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
