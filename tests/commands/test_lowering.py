"""What an exported file says about the preprocessing of its images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qat.commands.lowering import facts
from qat.recipe.loading import parse_recipe


@pytest.mark.parametrize(
    ("data", "resize"),
    [
        ({"dataset": "digits"}, None),
        ({"dataset": "cifar10", "image_size": 32}, "32"),
        ({"dataset": "imagefolder", "image_size": 224}, "256"),
        ({"dataset": "imagefolder", "image_size": 224, "resize": 230}, "230"),
    ],
)
def test_exports_record_the_resize_in_effect(data: dict[str, Any], resize: str | None) -> None:
    recipe = parse_recipe({"task": "pretrain", "model": {}, "data": data}, "r.yaml")
    checkpoint: Any = SimpleNamespace(recipe=recipe, metadata={}, quantization=None)
    assert facts(checkpoint, recipe.data.image_size).get("resize") == resize


@pytest.mark.parametrize(
    ("data", "turned"),
    [
        ({"dataset": "digits"}, None),
        ({"dataset": "imagefolder"}, "false"),
        ({"dataset": "imagefolder", "exif_orientation": True}, "true"),
    ],
)
def test_exports_record_whether_images_are_turned_upright(data: dict[str, Any], turned: str | None) -> None:
    recipe = parse_recipe({"task": "pretrain", "model": {}, "data": data}, "r.yaml")
    checkpoint: Any = SimpleNamespace(recipe=recipe, metadata={}, quantization=None)
    assert facts(checkpoint, recipe.data.image_size).get("exif_orientation") == turned
