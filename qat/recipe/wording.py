"""How messages about a recipe write its keys and values."""

from __future__ import annotations

import reprlib

#: The keys and list positions that lead from the top of a recipe to a value.
KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    """A key path as messages print it: ``("data", "mean", 1)`` becomes ``data.mean[1]``."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def found(value: object) -> str:
    """A value in the notation of YAML, for messages. Long values are cut short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return reprlib.repr(list(value) if isinstance(value, tuple) else value)
