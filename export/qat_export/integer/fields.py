"""Convert nested frozen dataclasses to a tree of JSON values and named arrays, and back.

In place of an array, the tree holds the array's digest. So the tree says which arrays belong to it, and
damaged arrays are found. Reading is guided by the annotations of the dataclasses. These may be
``NDArray[...]``, ``np.float32``, ``bool``, ``int``, ``float``, ``str``, ``Literal`` of texts, ``X | None``,
tuples, ``dict[str, ...]`` and dataclasses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from qat.errors import CheckpointError
from qat.system.tensor_hash import tensors_sha256

#: Names of the types in error messages.
_NAMES: Final = {bool: "true or false", int: "a whole number", float: "a number with a point", str: "a text"}


def named_arrays(value: object, name: str = "") -> Iterator[tuple[str, NDArray[Any]]]:
    """Every array in a dataclass with its dotted name, such as ``blocks.3.spatial.conv.sign_bits``."""
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from named_arrays(item, _dotted(name, str(index)))
    elif is_dataclass(value):
        for field in fields(value):
            yield from named_arrays(getattr(value, field.name), _dotted(name, field.name))


def digest(array: NDArray[Any]) -> str:
    """SHA-256 of an array's type, shape and values, as 64 hexadecimal digits.

    Computed by :func:`qat.system.tensor_hash.tensors_sha256` with ``[type, shape]`` as its facts.
    """
    values = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return tensors_sha256([([array.dtype.name, list(array.shape)], values)])


def to_tree(value: object) -> Any:
    """``value`` as JSON values: dataclasses become objects, tuples lists, and arrays their :func:`digest`.

    Finite floats, also those of NumPy, are read back from JSON bit for bit.
    """
    if isinstance(value, np.ndarray):
        return digest(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        return [to_tree(item) for item in value]
    if is_dataclass(value):
        return {field.name: to_tree(getattr(value, field.name)) for field in fields(value)}
    return value


def from_tree(hint: Any, node: object, arrays: dict[str, NDArray[Any]], name: str = "") -> Any:
    """The value of type ``hint`` that :func:`to_tree` turned into ``node``.

    Args:
        hint: a dataclass, or another annotation that the module's docstring lists.
        node: JSON values from a file, which is not trusted.
        arrays: arrays by dotted name; those that belong to the value are removed.
        name: dotted name of the value, for messages.

    Raises:
        CheckpointError: a key or an array is missing, unknown, damaged or of another type; the message names
            the field.
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (other,) = (option for option in options if option is not NoneType)
        return None if node is None else from_tree(other, node, arrays, name)
    if origin is np.ndarray:
        return _array(np.dtype(get_args(options[1])[0]), node, arrays, name)
    if origin is Literal:
        if node not in options:
            raise CheckpointError(f"{name}: found {_shown(node)}, allowed: {', '.join(map(repr, options))}")
        return node
    if origin is tuple:
        open_end = options[-1] is Ellipsis
        if not isinstance(node, list) or not (open_end or len(node) == len(options)):
            size = "a list" if open_end else f"a list of {len(options)}"
            raise CheckpointError(f"{name}: found {_shown(node)}, expected {size}")
        hints = options[:1] * len(node) if open_end else options
        pairs = zip(hints, node, strict=True)
        return tuple(from_tree(h, n, arrays, _dotted(name, str(i))) for i, (h, n) in enumerate(pairs))
    if origin is dict or is_dataclass(hint):
        if not isinstance(node, dict):
            raise CheckpointError(f"{name or 'the network'}: found {_shown(node)}, expected an object")
        if origin is dict:
            return {
                key: from_tree(options[1], item, arrays, f"{name}[{key!r}]") for key, item in node.items()
            }
        return _dataclass(hint, node, arrays, name)
    return _scalar(hint, node, name)


def _dataclass(hint: Any, node: dict[str, object], arrays: dict[str, NDArray[Any]], name: str) -> Any:
    hints = _hints(hint)
    for key in hints:
        if key not in node:
            raise CheckpointError(f"{_dotted(name, key)}: missing")
    for key in node:
        if key not in hints:
            raise CheckpointError(f"{name or 'the network'}: unknown key {_shown(key)}")
    return hint(**{key: from_tree(hints[key], node[key], arrays, _dotted(name, key)) for key in hints})


def _array(dtype: np.dtype[Any], node: object, arrays: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if not isinstance(node, str):
        raise CheckpointError(f"{name}: found {_shown(node)}, expected a tensor's SHA-256")
    if name not in arrays:
        raise CheckpointError(f"{name}: the tensor is missing")
    array = arrays.pop(name)
    if array.dtype != dtype:
        raise CheckpointError(f"{name}: found {array.dtype.name}, expected {dtype.name}")
    if (found := digest(array)) != node:
        raise CheckpointError(
            f"{name}: the tensor is damaged: its SHA-256 is {found[:12]}…, {_shown(node[:12])} was recorded"
        )
    return array


def _scalar(hint: Any, node: object, name: str) -> Any:
    if hint is np.float32:
        with np.errstate(over="ignore"):
            # The comparison is also False for NaN, which is refused.
            if isinstance(node, float) and float(np.float32(node)) == node:
                return np.float32(node)
        raise CheckpointError(f"{name}: found {_shown(node)}, expected a float32 number with a point")
    # Not isinstance: to Python True is an int, but not here.
    if type(node) is not hint:
        raise CheckpointError(f"{name}: found {_shown(node)}, expected {_NAMES[hint]}")
    return node


@functools.cache
def _hints(dataclass: type) -> dict[str, Any]:
    return get_type_hints(dataclass)


def _dotted(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf


def _shown(node: object) -> str:
    """A value from a file as a short text that is safe to print."""
    if isinstance(node, list):
        return f"a list of {len(node)}"
    if isinstance(node, dict):
        return "an object"
    text = repr(node)
    return text if len(text) <= 60 else f"{text[:60]}…"
