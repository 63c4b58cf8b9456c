"""The shipped recipes load, and agree where one continues another."""

from __future__ import annotations

import pytest

from qat.recipe.files import recipe_names, recipes_dir
from qat.recipe.loading import load_recipe
from tests.helpers.recipes import SHIPPED, file_problems


def test_the_shipped_recipes_are_those_listed() -> None:
    assert recipe_names() == SHIPPED
    assert sorted(path.name for path in recipes_dir().glob("*.y*ml")) == [f"{name}.yaml" for name in SHIPPED]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_loads_and_an_altered_one_does_not(name: str) -> None:
    loaded = load_recipe(name)
    assert (loaded.name, loaded.path) == (name, recipes_dir() / f"{name}.yaml")
    assert loaded.recipe.task == ("pretrain" if name.endswith("pretrain") else "finetune")
    [line] = file_problems(name, "model.sizes=tiny")
    assert line == "--set model.sizes=tiny: model.sizes: unknown key (did you mean 'size'?)"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_opens_with_the_command_that_runs_it(name: str) -> None:
    first = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    command = "pretrain" if name.endswith("pretrain") else "finetune"
    assert first.startswith(f"# qat {command} --recipe recipes/{name}.yaml")


def test_the_digits_recipes_agree_with_the_one_that_makes_their_checkpoint() -> None:
    made = load_recipe("tiny_digits_pretrain").recipe
    for name in ("tiny_int8", "tiny_int8_paper"):
        used = load_recipe(name).recipe
        assert used.model.model_copy(update={"checkpoint": None}) == made.model
        for key in ("dataset", "image_size", "mean", "std", "train_split", "test_split"):
            assert getattr(used.data, key) == getattr(made.data, key), f"{name}: data.{key}"


def test_the_paper_recipe_differs_from_tiny_int8_in_the_trunk_only() -> None:
    full, paper = (load_recipe(name).recipe.model_dump() for name in ("tiny_int8", "tiny_int8_paper"))
    assert full["quantization"]["trunk"].pop("enabled") is True
    assert paper["quantization"]["trunk"].pop("enabled") is False
    full["quantization"].pop("trunk"), paper["quantization"].pop("trunk")
    assert paper == full


def test_the_imagenet_recipes_differ_in_size_teachers_and_how_a_step_is_cut_up() -> None:
    names = [name for name in SHIPPED if name.endswith("imagenet_pretrain")]
    common, images = [], []
    for name in names:
        recipe = load_recipe(name).recipe.model_dump()
        assert f"{recipe['model'].pop('size')}_imagenet_pretrain" == name
        assert len(recipe["distillation"].pop("teachers")) == 2
        images.append(recipe["data"].pop("batch_size") * recipe["schedule"].pop("accumulate"))
        common.append(recipe)
    assert images == [512] * 4
    assert all(recipe == common[0] for recipe in common)
