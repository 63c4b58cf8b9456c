"""Names of quantized networks: the widths of their integers, and what is left in float."""

from __future__ import annotations

from typing import Any

import pytest

from qat.quantize.naming import group_of_point, quantization_name
from qat.quantize.preparation import prepare, quantization_map
from qat.recipe.loading import load_recipe
from qat.recipe.schema import Quantization
from tests.conftest import build_float_toy

OFF = {"enabled": False}


def named(**changes: Any) -> str:
    section = Quantization.model_validate(changes)
    return quantization_name(prepare(build_float_toy(), section), section)


@pytest.mark.parametrize(
    ("recipe", "name"), [("tiny_int8", "int8"), ("tiny_int8_paper", "int8 (trunk in float)")]
)
def test_the_packaged_recipes_are_named_by_what_they_quantize(recipe: str, name: str) -> None:
    section = load_recipe(recipe).recipe.quantization
    assert section is not None
    assert quantization_name(prepare(build_float_toy(), section), section) == name


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"se": {"weight_bits": 4}}, "int4/int8"),
        ({"se": {"weight_bits": 4, "activation_bits": 6}}, "int4/int6/int8"),
        ({"trunk": {"activation_bits": 16}}, "int8/int16"),
        (
            {
                "stem": {"weight_bits": 4},
                "se": {"weight_bits": 4, "activation_bits": 4},
                "classifier": {"weight_bits": 4, "activation_bits": 4},
                "trunk": {"activation_bits": 4},
            },
            "int4",
        ),
        ({"overrides": [{"match": "fc", "weight_bits": 3}]}, "int3/int8"),
        ({"se": OFF, "trunk": OFF}, "int8 (channel attention and trunk in float)"),
        ({"include": ["fc"]}, "int8 (stem, channel attention and trunk in float)"),
    ],
)
def test_every_width_and_every_group_in_float_is_named(changes: dict[str, Any], name: str) -> None:
    assert named(**changes) == name


def test_a_group_of_which_single_layers_stay_in_float_is_partly_so() -> None:
    assert named(exclude=["feature.2.Attention.se"]) == "int8 (channel attention partly in float)"
    assert named(exclude=["fc", "feature.2.trunk_out"]) == "int8 (classifier in float, trunk partly in float)"


def test_without_a_quantization_point_the_name_is_float_rest() -> None:
    assert named(stem=OFF, se=OFF, classifier=OFF, trunk=OFF) == "float rest"


def test_every_point_belongs_to_the_group_whose_bits_it_has() -> None:
    bits = {"stem": 3, "se": 4, "classifier": 5, "trunk": 6}
    sections = {
        "stem": {"weight_bits": 3},
        "se": {"weight_bits": 4, "activation_bits": 4},
        "classifier": {"weight_bits": 5, "activation_bits": 5},
        "trunk": {"activation_bits": 6},
    }
    points = quantization_map(prepare(build_float_toy(), Quantization.model_validate(sections)))
    image = points.pop("feature.0.image")
    assert (image["type"], group_of_point("feature.0.image")) == ("uint8", "stem")
    for name, point in points.items():
        width = 8 if name.endswith(".gain") else bits[group_of_point(name)]
        assert str(point["type"]).endswith(f"int{width}"), name
    assert group_of_point("feature.0.trunk") == group_of_point("feature.0.trunk.scale") == "trunk"
