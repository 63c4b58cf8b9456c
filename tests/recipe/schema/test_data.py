"""Keys of the data section that depend on the data set."""

from __future__ import annotations

import pytest

from qat.recipe.loading import parse_recipe
from tests.helpers.recipes import PRETRAIN, problems, value_at


@pytest.mark.parametrize("key", ["name", "config", "revision", "image_column", "label_column", "streaming"])
def test_a_key_of_another_data_set_is_refused(key: str) -> None:
    value = True if key == "streaming" else "x"
    data = {"dataset": "hub", "name": "someone/images", key: value}
    assert value_at(parse_recipe({**PRETRAIN, "data": data}, "r.yaml"), f"data.{key}") == value
    for other in ("digits", "imagefolder", "cifar10"):
        [line] = problems({**PRETRAIN, "data": {"dataset": other, key: value}})
        assert line.startswith(f"r.yaml: data.{key}: found ")
        assert "'hub' has it" in line


def test_a_data_set_of_the_hub_needs_its_name() -> None:
    [line] = problems({**PRETRAIN, "data": {"dataset": "hub"}})
    assert line.startswith("r.yaml: data.name: missing; dataset 'hub' needs a repository")


def test_what_null_means_depends_on_the_data_set() -> None:
    folder = parse_recipe({**PRETRAIN, "data": {"dataset": "imagefolder", "image_size": 224}}, "r").data
    assert (folder.evaluated_split, folder.shorter_side) == ("validation", 256)
    cifar10 = parse_recipe({**PRETRAIN, "data": {"dataset": "cifar10", "image_size": 32}}, "r").data
    assert (cifar10.evaluated_split, cifar10.shorter_side) == ("test", 32)
    given = {"dataset": "cifar10", "image_size": 32, "resize": 40, "test_split": "train"}
    explicit = parse_recipe({**PRETRAIN, "data": given}, "r").data
    assert (explicit.evaluated_split, explicit.shorter_side) == ("train", 40)
