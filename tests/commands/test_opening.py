"""Opening a model: what is known of each kind, and which recipe is its own."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from qat.checkpoints.format import load_checkpoint
from qat.commands.opening import open_model
from qat.errors import CheckpointError, RecipeError
from qat.evaluation import input_for
from tests.helpers.toy_runs import succeed, tuned


def test_run_checkpoint_and_export_are_opened_alike(toys: Path) -> None:
    opened = {
        name: open_model(path, None, (), pytest.fail)
        for name, path in (("run", tuned(toys).parent), ("file", tuned(toys)), ("onnx", toys / "model.onnx"))
    }
    first = opened["run"]
    assert {one.file.name for one in opened.values()} == {"best.safetensors", "model.onnx"}
    assert first.file == opened["file"].file == tuned(toys)
    assert {one.format for one in opened.values()} == {"bnext-qat", "bnext-qat portable 1"}
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    expected = first.predict(input_for(first.predict, images, first.data))
    for one in opened.values():
        assert (one.data, one.num_classes, one.recipe) == (first.data, 10, first.recipe)
        assert one.architecture == "BNext custom [8, 8, 16], 10 classes, stem stride 1"
        assert torch.equal(one.predict(input_for(one.predict, images, one.data)), expected)


def test_overrides_change_the_data_and_not_the_recipe_of_the_model(toys: Path) -> None:
    for path in (tuned(toys), toys / "model.onnx"):
        one = open_model(path, None, ["data.eval_batch_size=7"], pytest.fail)
        assert one.data.eval_batch_size == 7
        assert one.recipe is not None
        assert one.recipe.data.eval_batch_size == 256
    with pytest.raises(RecipeError, match="only keys of `data` may be set"):
        open_model(tuned(toys), None, ["seed=1"], pytest.fail)


def test_a_recipe_lends_its_data_and_the_model_keeps_its_own_recipe(toys: Path, tmp_path: Path) -> None:
    own = load_checkpoint(tuned(toys)).recipe
    model = onnx.load(toys / "model.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props if entry.key != "recipe"}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match="metadata 'recipe' is missing or damaged: give --recipe"):
        open_model(tmp_path / "m.onnx", None, (), pytest.fail)
    text = succeed("recipe", "show", "tiny_int8", "--set", "data.image_size=8", "--set", "seed=9")
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    for path, expected in ((toys / "model.onnx", own), (tmp_path / "m.onnx", None)):
        one = open_model(path, str(tmp_path / "r.yaml"), (), pytest.fail)
        assert (one.data.image_size, one.recipe) == (8, expected)
