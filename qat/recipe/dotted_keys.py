"""Recipes as flat mappings: one dotted key, such as ``data.augment.flip``, for each value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qat.recipe.schema import Recipe


def flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value that is no mapping with its dotted key, in the order in which they are written.

    Args:
        section: nested mappings, as ``model_dump`` of a recipe or of one of its sections gives them.
        prefix: opens each key, such as ``"quantization."``.
    """
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flat_recipe(recipe: Recipe) -> dict[str, Any]:
    """Every value of ``recipe`` by its dotted key, as JSON has it."""
    return dict(flatten(recipe.model_dump(mode="json")))


def with_values(recipe: Recipe, values: Mapping[str, object]) -> Recipe:
    """A copy of ``recipe`` with other values.

    Args:
        recipe: stays as it is.
        values: by dotted key of one section and one name at most, such as ``data.workers`` or ``seed``.
    """
    content = recipe.model_dump(mode="json")
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (content[section] if section else content)[name] = value
    return Recipe.model_validate(content)
