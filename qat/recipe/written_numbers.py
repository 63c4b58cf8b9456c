"""Numbers that know how they were written, and what becomes of them in a recipe.

In YAML a folder called 2024 and a revision called 12e4567 read as numbers. Where the schema has a text, the
text that was written is taken; everywhere else the number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel


class WrittenInt(int):
    """A whole number, and the text that it was read from."""

    text = ""


class WrittenFloat(float):
    """A floating-point number, and the text that it was read from."""

    text = ""


def as_the_schema_has_it(value: object, annotation: Any) -> object:
    """``value`` with a plain number or a text in place of every number that knows how it was written.

    Args:
        value: read from YAML, of any shape.
        annotation: the type that the schema has here; ``None`` where it has none.
    """
    if isinstance(value, WrittenInt | WrittenFloat):
        if _takes(annotation, str):
            return value.text
        return int(value) if isinstance(value, WrittenInt) else float(value)
    if isinstance(value, Mapping):
        section = _section(annotation)
        fields = {} if section is None else section.model_fields
        return {
            key: as_the_schema_has_it(inner, fields[key].annotation if key in fields else None)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [as_the_schema_has_it(inner, annotation) for inner in value]
    return value


def _takes(annotation: Any, kind: type) -> bool:
    """Whether ``kind`` is what ``annotation`` says, or part of it, as in ``list[str] | None``."""
    return annotation is kind or any(_takes(part, kind) for part in get_args(annotation))


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part)) is not None), None)
