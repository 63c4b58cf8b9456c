"""Recipes built, written back and described; the checkpoint that a recipe names is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qat.errors import RecipeError
from qat.recipe import loading
from qat.recipe import schema as schema_module
from qat.recipe.files import recipes_dir
from qat.recipe.loading import load_recipe, parse_recipe, recipe_schema, recipe_yaml, resolve_checkpoint
from qat.recipe.schema import Data, Model, Recipe, Section
from tests.helpers.recipes import FINETUNE, PRETRAIN, SHIPPED, changed, leaves, write


def test_a_recipe_built_in_python_is_checked_like_one_from_a_file() -> None:
    sections = {"model": Model(), "data": Data()}
    assert Recipe(task="pretrain", **sections).teacher == "none"
    with pytest.raises(ValueError, match="quantization: missing"):
        Recipe(task="finetune", **sections)


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse_recipe(PRETRAIN, "r.yaml")
    for frozen, key in ((recipe, "seed"), (recipe.data, "batch_size"), (recipe.data.augment, "flip")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(frozen, key, 1)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_written_recipe_loads_back_equal(name: str, folder: Path) -> None:
    recipe = load_recipe(name).recipe
    text = recipe_yaml(recipe)
    assert load_recipe(write(folder, text)).recipe == recipe
    assert parse_recipe(yaml.safe_load(text), "r.yaml") == recipe
    assert recipe_yaml(load_recipe("r.yaml").recipe) == text


def test_a_written_recipe_has_every_key() -> None:
    recipe = parse_recipe(FINETUNE, "r.yaml")
    written = yaml.safe_load(recipe_yaml(recipe))
    assert list(written) == list(Recipe.model_fields)
    assert leaves(written) == leaves(recipe.model_dump())


@pytest.mark.parametrize("text", ["1e3", "2024-01-01", "null", "yes", "010", "a: b", "ü\n#", " x "])
def test_a_text_that_looks_like_something_else_survives_writing(text: str, folder: Path) -> None:
    images = changed(PRETRAIN, "data.dataset", "imagefolder")
    recipe = parse_recipe(changed(images, "data.root", text), "r.yaml")
    assert load_recipe(write(folder, recipe_yaml(recipe))).recipe.data.root == text


def test_the_schema_describes_every_key_and_section() -> None:
    schema = recipe_schema()
    described = {"Recipe": schema, **schema["$defs"]}
    names = {cls.__name__ for cls in Section.__subclasses__()} | {"Group"}
    assert set(described) == names
    for name, section in described.items():
        assert section["additionalProperties"] is False, name
        assert section["description"].strip(), name
        assert set(section["properties"]) == set(getattr(schema_module, name).model_fields), name
        for key, entry in section["properties"].items():
            assert len(entry.get("description", "")) > 10, f"{name}.{key}"


def test_the_schema_requires_what_has_no_default() -> None:
    schema = recipe_schema()
    assert schema["required"] == ["task", "model", "data"]
    required = {
        name: section["required"] for name, section in schema["$defs"].items() if "required" in section
    }
    assert required == {"LayerOverride": ["match"]}


def test_a_checkpoint_is_looked_up_beside_the_recipe_then_here_then_packaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = folder / "packaged"
    monkeypatch.setattr(loading, "recipes_dir", lambda: packaged)
    beside = folder / "beside"
    for place in (packaged, beside):
        place.mkdir()
    write(beside, yaml.safe_dump(FINETUNE))
    loaded = load_recipe("beside/r.yaml")
    for place in (packaged, folder, beside):  # from the place searched last to the first
        write(place, "", "a.safetensors")
        assert resolve_checkpoint(loaded) == place / "a.safetensors"
    absolute = load_recipe("beside/r.yaml", [f"model.checkpoint={packaged / 'a.safetensors'}"])
    assert resolve_checkpoint(absolute) == packaged / "a.safetensors"


def test_an_absent_checkpoint_is_refused_with_the_places_looked_at(folder: Path) -> None:
    write(folder, yaml.safe_dump(FINETUNE))
    (folder / "a.safetensors").mkdir()  # a folder is no checkpoint
    with pytest.raises(RecipeError) as caught:
        resolve_checkpoint(load_recipe("r.yaml"))
    assert str(caught.value) == (
        "r.yaml: model.checkpoint: found no file 'a.safetensors'; looked for a.safetensors, "
        f"{recipes_dir() / 'a.safetensors'}"
    )
    with pytest.raises(RecipeError, match=r"r\.yaml: model\.checkpoint: found no file 'x{4000}"):
        resolve_checkpoint(load_recipe("r.yaml", ["model.checkpoint=" + "x" * 4000]))


def test_a_recipe_without_checkpoint_has_none_to_resolve() -> None:
    with pytest.raises(RecipeError, match=r"model\.checkpoint: missing"):
        resolve_checkpoint(load_recipe("tiny_digits_pretrain"))
