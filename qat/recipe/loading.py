"""Reads recipes from YAML, applies overrides, checks the result by the schema, and writes recipes.

All errors of a recipe are reported together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from qat.errors import RecipeError
from qat.recipe.files import (
    Override,
    apply_overrides,
    find_recipe,
    read_recipe_file,
    recipes_dir,
    shown,
    write_yaml,
)
from qat.recipe.problems import not_a_mapping, problem_lines
from qat.recipe.schema import (
    TIMM,
    Recipe,
    compared_defaults,
)
from qat.recipe.written_numbers import as_the_schema_has_it

__all__ = [
    "LoadedRecipe",
    "load_recipe",
    "parse_recipe",
    "recipe_schema",
    "recipe_yaml",
    "resolve_checkpoint",
    "resolve_teachers",
]


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and the file that it was read from. ``name`` is the file's name without its ending."""

    name: str
    path: Path
    recipe: Recipe


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe, apply overrides, and check it.

    Args:
        name_or_path: see :func:`qat.recipe.files.find_recipe`.
        overrides: texts ``section.key=value``.

    Raises:
        RecipeError: the recipe can't be read or is not valid. The message has a line for each problem of the
            file and of the overrides.
    """
    path = find_recipe(name_or_path)
    raw, source = read_recipe_file(path), shown(path)
    return LoadedRecipe(path.stem, path, parse_recipe(raw, source, overrides))


def parse_recipe(mapping: object, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Apply overrides to a mapping, from YAML or from a checkpoint, and check it.

    Args:
        mapping: the content of the recipe.
        source: what it is called at the start of each line of an error.
        overrides: texts ``section.key=value``.

    Raises:
        RecipeError: the recipe is not valid. The message has a line for each problem, with the key, the value
            that was found, and what is allowed.
    """
    if not isinstance(mapping, Mapping):
        raise RecipeError(not_a_mapping(mapping, source, _schema()))
    changed, applied, problems = apply_overrides(mapping, overrides)
    changed = cast(dict[Any, object], as_the_schema_has_it(changed, Recipe))
    recipe, more = _check(changed, source, applied)
    if recipe is None or problems:
        raise RecipeError("\n".join(problems + more))
    return recipe


def _check(
    raw: Mapping[Any, object], source: str, overrides: Sequence[Override]
) -> tuple[Recipe | None, list[str]]:
    """The recipe, or ``None`` and a line for each problem, which begins with its override or file."""
    try:
        return Recipe.model_validate(dict(raw)), []
    except ValidationError as error:
        return None, problem_lines(
            error, raw, source, overrides, schema=_schema(), defaults=compared_defaults()
        )


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every key written out, in the schema's order. It loads as an equal recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def resolve_checkpoint(loaded: LoadedRecipe) -> Path:
    """The file that ``model.checkpoint`` names.

    It is looked for in the folder of the recipe, then in the working directory, then among the packaged
    recipes.

    Raises:
        RecipeError: the key is null, or there is no such file. The message lists the places that were
            searched.
    """
    named = loaded.recipe.model.checkpoint
    if named is None:
        where = f"{shown(loaded.path)}: model.checkpoint"
        raise RecipeError(f"{where}: missing; the path of a checkpoint is needed")
    return _find(loaded, "model.checkpoint", named)


def resolve_teachers(loaded: LoadedRecipe) -> list[str]:
    """``distillation.teachers``, in which paths are absolute. Names of timm models stay as they are.

    Raises:
        RecipeError: a file is found in none of the places that :func:`resolve_checkpoint` searches.
    """
    teachers = loaded.recipe.distillation.teachers
    key = "distillation.teachers"
    return [name if name.startswith(TIMM) else str(_find(loaded, key, name)) for name in teachers]


def _find(loaded: LoadedRecipe, key: str, named: str) -> Path:
    # If `named` is an absolute path, joining it to a folder gives `named` itself, so that all three places
    # are one. The packaged folder is searched for a recipe that was copied away from its checkpoint.
    folders = (loaded.path.parent, Path.cwd(), recipes_dir())
    places = list(dict.fromkeys((folder / named).absolute() for folder in folders))
    for place in places:
        if _is_file(place):
            return place
    looked = ", ".join(map(shown, places))
    raise RecipeError(f"{shown(loaded.path)}: {key}: found no file {named!r}; looked for {looked}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False
