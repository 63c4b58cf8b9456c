"""Descriptions with one field changed, and what differs between two of them."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from qat_export.integer.network import IntegerNetwork


def changed(network: IntegerNetwork, path: str, value: Any) -> IntegerNetwork:
    """A copy with the field at a dotted path replaced; a function is called with the old value."""
    return _changed(network, path.split("."), value)


def _changed(node: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value(node) if isinstance(value, Callable) else value
    first, *rest = path
    if isinstance(node, tuple):
        return tuple(_changed(item, rest, value) if i == int(first) else item for i, item in enumerate(node))
    return dataclasses.replace(node, **{first: _changed(getattr(node, first), rest, value)})


def at(node: Any, path: str) -> Any:
    """The field at a dotted path."""
    for part in path.split("."):
        node = node[int(part)] if isinstance(node, tuple) else getattr(node, part)
    return node


def differences(a: Any, b: Any, name: str = "") -> Iterator[str]:
    """Names of the fields that are not of the same type and, bit for bit, the same value."""
    if type(a) is not type(b):
        yield f"{name}: {type(a).__name__}, {type(b).__name__}"
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            yield from differences(getattr(a, field.name), getattr(b, field.name), f"{name}.{field.name}")
    elif isinstance(a, tuple) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from differences(left, right, f"{name}.{index}")
    elif isinstance(a, np.ndarray | np.generic):
        if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
            yield name
    elif isinstance(a, float):
        if struct.pack("d", a) != struct.pack("d", b):
            yield name
    elif a != b:
        yield name
