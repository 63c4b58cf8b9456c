"""Recipes: read from YAML, changed by overrides, checked against :mod:`qat.recipe.schema`, written out again.

All of a recipe's errors are reported together (`parse_recipe`).
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
    """A recipe and the file it came from; ``name`` is the file's stem."""

    name: str
    path: Path
    recipe: Recipe


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe by path or packaged name, change it by ``a.b=value`` texts, and check it.

    Raises one `RecipeError` with a line per problem, those of the file and of ``overrides`` together.
    """
    path = find_recipe(name_or_path)
    raw, source = read_recipe_file(path), shown(path)
    return LoadedRecipe(path.stem, path, parse_recipe(raw, source, overrides))


def parse_recipe(mapping: object, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check a mapping (from YAML, or stored in a checkpoint) after changing it by ``a.b=value`` texts.

    ``source`` opens each line of the error. Raises one `RecipeError` with a line per problem: key path, what
    was found, what is allowed.
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
    """Validate; every problem is one line that opens with the override or file it comes from."""
    try:
        return Recipe.model_validate(dict(raw)), []
    except ValidationError as error:
        return None, problem_lines(
            error, raw, source, overrides, schema=_schema(), defaults=compared_defaults()
        )


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every key written out, in schema order; loads back to an equal recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def resolve_checkpoint(loaded: LoadedRecipe) -> Path:
    """The file ``model.checkpoint`` means: beside the recipe, in the working directory, or packaged.

    Raises `RecipeError` with the places looked at when there is none.
    """
    named = loaded.recipe.model.checkpoint
    if named is None:
        where = f"{shown(loaded.path)}: model.checkpoint"
        raise RecipeError(f"{where}: missing; the path of a checkpoint is needed")
    return _find(loaded, "model.checkpoint", named)


def resolve_teachers(loaded: LoadedRecipe) -> list[str]:
    """``distillation.teachers`` with absolute paths, found as `resolve_checkpoint` finds them."""
    teachers = loaded.recipe.distillation.teachers
    key = "distillation.teachers"
    return [name if name.startswith(TIMM) else str(_find(loaded, key, name)) for name in teachers]


def _find(loaded: LoadedRecipe, key: str, named: str) -> Path:
    # An absolute path replaces the folder it is joined to: all three are then the same place. The packaged
    # folder comes last so that a copied recipe still finds the checkpoint it was written for.
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
