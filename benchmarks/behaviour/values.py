"""The values of a record: digests, and how two records differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: Values by name; objects and lists may lie in one another.
Values = dict[str, Any]


def digest(content: bytes | str) -> str:
    """SHA-256, of a text as UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order given."""
    found = hashlib.sha256()
    for name, value in tensors:
        values = value.detach().contiguous().numpy()
        found.update(f"{name} {values.dtype} {values.shape}\n".encode())
        found.update(values.tobytes())
    return found.hexdigest()


def timeless(content: Any) -> Any:
    """Parsed JSON without what depends on the clock."""
    if isinstance(content, dict):
        clocks = ("seconds", "images_per_second", "finished", "recorded")
        return {key: timeless(value) for key, value in content.items() if key not in clocks}
    return [timeless(one) for one in content] if isinstance(content, list) else content


def flat(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested objects and lists by their path."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        path = f"{name} / {key}" if name else str(key)
        if isinstance(value, dict | list):
            yield from flat(value, path)
        else:
            yield path, value


def differences(before: Path, after: Path) -> list[str]:
    """A line for each value that is not the same in both records, or is in one of them only."""
    one, other = (dict(flat(json.loads(path.read_text("utf-8")))) for path in (before, after))
    lines = []
    for name in {**one, **other}:
        if name not in one or name not in other:
            lines.append(f"{name}: only in {before if name in one else after}")
        elif one[name] != other[name]:
            lines.append(f"{name}: {one[name]} → {other[name]}{_relative(one[name], other[name])}")
    return lines


def _relative(a: object, b: object) -> str:
    """How far apart two numbers are; nothing for what is no number."""
    try:
        x, y = float(str(a)), float(str(b))
    except ValueError:
        return ""
    largest = max(abs(x), abs(y))
    return f" (relative {abs(x - y) / largest:.1e})" if 0 < largest < float("inf") else ""
