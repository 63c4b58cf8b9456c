"""Recipes as flat mappings, and what a dotted key changes."""

from __future__ import annotations

from qat.recipe.dotted_keys import flat_recipe, flatten, with_values
from qat.recipe.loading import load_recipe


def test_each_value_has_the_keys_that_lead_to_it_in_their_order() -> None:
    nested = {"b": {"d": 1, "c": {"e": [2, {"f": 3}]}}, "a": None, "empty": {}}
    assert list(flatten(nested)) == [("b.d", 1), ("b.c.e", [2, {"f": 3}]), ("a", None)]
    assert list(flatten({"x": 1}, "section.")) == [("section.x", 1)]


def test_a_flat_recipe_has_every_value_of_its_sections() -> None:
    recipe = load_recipe("tiny_int8", ["data.augment.translate=0.25", "seed=3"]).recipe
    flat = flat_recipe(recipe)
    assert (flat["data.augment.translate"], flat["seed"], flat["task"]) == (0.25, 3, "finetune")
    assert not any(isinstance(value, dict) for value in flat.values())


def test_other_values_are_those_of_a_recipe_read_with_them() -> None:
    recipe = load_recipe("tiny_int8").recipe
    changed = with_values(recipe, {"seed": 5, "data.workers": 3, "tracking.every": 7})
    assert changed == load_recipe("tiny_int8", ["seed=5", "data.workers=3", "tracking.every=7"]).recipe
    assert recipe == load_recipe("tiny_int8").recipe
