"""Minimal recipes, copies with one key changed, and the lines of the errors about them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from qat.errors import RecipeError
from qat.recipe.loading import load_recipe, parse_recipe
from qat.recipe.schema import Recipe

SHIPPED = [
    "large_imagenet_pretrain",
    "middle_imagenet_pretrain",
    "small_imagenet_pretrain",
    "tiny_cifar10_pretrain",
    "tiny_digits_pretrain",
    "tiny_imagenet_pretrain",
    "tiny_int8",
    "tiny_int8_cifar10",
    "tiny_int8_imagenet",
    "tiny_int8_paper",
    "tiny_int8_transfer",
]
FINETUNE: dict[str, Any] = {
    "task": "finetune",
    "model": {"checkpoint": "a.safetensors"},
    "data": {},
    "quantization": {},
}
PRETRAIN: dict[str, Any] = {"task": "pretrain", "model": {}, "data": {}}


def changed(base: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """``base`` with one dotted key set, sections created as needed."""
    result = copy.deepcopy(base)
    *sections, last = key.split(".")
    inner = result
    for name in sections:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return result


def problems(raw: object, source: str = "r.yaml") -> list[str]:
    """The lines of the error a mapping is refused with."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw, source)
    return str(caught.value).splitlines()


def file_problems(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


def value_at(recipe: Recipe, key: str) -> object:
    value: object = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def write(folder: Path, text: str | bytes, name: str = "r.yaml") -> str:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return name


def leaves(value: object, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {prefix.rstrip(".")}
    return set().union(*(leaves(inner, f"{prefix}{key}.") for key, inner in value.items()))
