"""The values of a record: how they are computed from files and tensors, and how two records are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: Values by name, in nested objects and lists.
Values = dict[str, Any]


def digest(content: bytes | str) -> str:
    """SHA-256 of bytes, or of a text as UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the tensors' names, types, shapes and bytes, in their order."""
    found = hashlib.sha256()
    for name, value in tensors:
        values = value.detach().contiguous().numpy()
        found.update(f"{name} {values.dtype} {values.shape}\n".encode())
        found.update(values.tobytes())
    return found.hexdigest()


def timeless(content: Any) -> Any:
    """Parsed JSON without the keys that depend on the clock."""
    if isinstance(content, dict):
        clocks = ("seconds", "images_per_second", "finished", "recorded")
        return {key: timeless(value) for key, value in content.items() if key not in clocks}
    return [timeless(one) for one in content] if isinstance(content, list) else content


def flat(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested objects and lists, each with its path."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        path = f"{name} / {key}" if name else str(key)
        if isinstance(value, dict | list):
            yield from flat(value, path)
        else:
            yield path, value


def differences(before: Path, after: Path) -> list[str]:
    """A line for each value that differs between two records, or is in only one of them."""
    one, other = (dict(flat(json.loads(path.read_text("utf-8")))) for path in (before, after))
    lines = []
    for name in {**one, **other}:
        if name not in one or name not in other:
            lines.append(f"{name}: only in {before if name in one else after}")
        elif one[name] != other[name]:
            lines.append(f"{name}: {one[name]} → {other[name]}{_relative(one[name], other[name])}")
    return lines


def _relative(a: object, b: object) -> str:
    """The relative difference of two numbers as text; empty if one of the values is not a number."""
    try:
        x, y = float(str(a)), float(str(b))
    except ValueError:
        return ""
    largest = max(abs(x), abs(y))
    return f" (relative {abs(x - y) / largest:.1e})" if 0 < largest < float("inf") else ""
