"""Recipes as flat mappings, in which each value has a dotted key such as ``data.augment.flip``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qat.recipe.schema import Recipe


def flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each entry that is not itself a mapping, in their order.

    Args:
        section: nested mappings, from ``model_dump`` of a recipe or of one of its sections.
        prefix: text put in front of each key, such as ``"quantization."``.
    """
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flat_recipe(recipe: Recipe) -> dict[str, Any]:
    """Every value of ``recipe`` by its dotted key, in types that JSON has."""
    return dict(flatten(recipe.model_dump(mode="json")))


def with_values(recipe: Recipe, values: Mapping[str, object]) -> Recipe:
    """A copy of ``recipe`` in which the given ``values`` replace its own.

    Args:
        recipe: the recipe to copy.
        values: new values by dotted key. A key is a name, such as ``seed``, or a section and a name, such as
            ``data.workers``.

    Raises:
        pydantic.ValidationError: a value is not allowed.
    """
    content = recipe.model_dump(mode="json")
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (content[section] if section else content)[name] = value
    return Recipe.model_validate(content)
