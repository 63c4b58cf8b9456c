"""qat evaluate: what it prints, what it warns of, and how each wrong input ends."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from qat.checkpoints.format import load_checkpoint, save_checkpoint
from qat.checkpoints.loading import build
from qat.models.bnext import set_temperature
from tests.helpers.toy_runs import TOY, fail, image_folder, qat, settings, succeed, tuned


def test_evaluate_prints_one_json_object_and_agrees_for_run_checkpoint_and_model(toys: Path) -> None:
    found = []
    for model in (tuned(toys).parent, tuned(toys), toys / "model.onnx"):
        text = succeed("evaluate", model, "--json")
        assert len(text.splitlines()) == 1
        found.append(json.loads(text))
    assert {"top1", "top5", "n"} <= set(found[0])
    assert found[0]["n"] == 360
    assert found[0] == found[1]
    assert {one["top1"] for one in found} == {found[0]["top1"]}
    assert succeed("evaluate", toys / "model.onnx").startswith(f"top-1 {found[0]['top1']:.2f}%  top-5 ")


def test_published_weights_are_evaluated_with_the_stem_stride_of_the_recipe(
    toys: Path, tmp_path: Path
) -> None:
    published = tmp_path / "published.pth"
    torch.save(load_checkpoint(toys / "float.safetensors").state, published)
    found = {}
    for stride in (1, 2):
        overrides = (*TOY, f"model.stem_stride={stride}")
        recipe_yaml = succeed("recipe", "show", "tiny_digits_pretrain", *settings(overrides))
        (tmp_path / f"{stride}.yaml").write_text(recipe_yaml, encoding="utf-8")
        found[stride] = succeed("evaluate", published, "--recipe", tmp_path / f"{stride}.yaml", "--json")
    assert found[1] == succeed("evaluate", toys / "float.safetensors", "--json")
    assert found[1] != found[2]
    # Our own checkpoint knows its stride.
    result = qat("evaluate", toys / "float.safetensors", "--recipe", tmp_path / "2.yaml", "--json")
    assert (result.exit_code, result.stdout) == (0, found[1])
    assert "describes BNext custom [8, 8, 16], 10 classes, stem stride 2; evaluated is what" in result.stderr


def test_which_weights_of_several_are_evaluated_is_said_and_can_be_changed(
    toys: Path, tmp_path: Path
) -> None:
    state = load_checkpoint(toys / "float.safetensors").state
    other = state | {"fc.weight": -state["fc.weight"]}
    torch.save({"model": state, "model_ema": other}, tmp_path / "w.pth")
    recipes = {}
    for key in ("null", "model"):
        recipe_yaml = succeed(
            "recipe", "show", "tiny_digits_pretrain", *settings((*TOY, f"model.state_key={key}"))
        )
        recipes[key] = tmp_path / f"{key}.yaml"
        recipes[key].write_text(recipe_yaml, encoding="utf-8")
    result = qat("evaluate", tmp_path / "w.pth", "--recipe", recipes["null"], "--json")
    assert result.exit_code == 0
    assert "w.pth: its weights are those of model_ema, an average" in result.stderr
    expected = succeed("evaluate", toys / "float.safetensors", "--json")
    assert result.stdout != expected
    assert succeed("evaluate", tmp_path / "w.pth", "--recipe", recipes["model"], "--json") == expected


def test_a_recipe_of_another_network_lends_its_data_with_a_warning(toys: Path) -> None:
    path = toys / "float.safetensors"
    result = qat("evaluate", path, "--recipe", "tiny_int8", "--set", "data.image_size=8", "--json")
    assert (result.exit_code, result.stdout) == (0, succeed("evaluate", path, "--json"))
    assert "model: describes BNext tiny, 10 classes" in result.stderr


def test_weights_that_are_not_binary_are_evaluated_with_a_warning(toys: Path, tmp_path: Path) -> None:
    stored = load_checkpoint(toys / "float.safetensors")
    for temperature in (1e-7, 0.3):
        model = build(stored)
        set_temperature(model, temperature)
        path = tmp_path / f"{temperature}.safetensors"
        save_checkpoint(path, model, recipe=stored.recipe)
        result = qat("evaluate", path, "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["n"] == 360
        assert result.stderr == (
            f"warning: {path}: the weights in use are not binary: the temperature is {temperature:.3g}, "
            "binary means below 1e-7\n"
        )
    succeed("evaluate", toys / "float.safetensors", "--json")


def test_another_image_size_is_evaluated_with_a_warning(toys: Path) -> None:
    result = qat("evaluate", tuned(toys), "--set", "data.image_size=16", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["n"] == 360
    assert result.stderr == f"warning: data.image_size is 16, {tuned(toys)} was trained with 8\n"


# Wrong input


def test_another_normalization_is_refused_for_a_quantized_checkpoint_and_unusual_for_others(
    toys: Path, tmp_path: Path
) -> None:
    for key, value in (("mean", [0.0, 0.0, 1.0]), ("std", [1.0, 1.0, 0.5])):
        override = f"data.{key}={value}"
        message = fail(2, "evaluate", tuned(toys), "--set", override)
        assert f"data.{key} is {value}, {tuned(toys)} was made for [" in message
        (tmp_path / "r.yaml").write_text(
            succeed("recipe", "show", "tiny_int8", *settings([*TOY, override])), encoding="utf-8"
        )
        assert f"data.{key} is {value}" in fail(2, "evaluate", tuned(toys), "--recipe", tmp_path / "r.yaml")
        result = qat("evaluate", toys / "float.safetensors", "--set", override)
        assert result.exit_code == 0
        assert result.stderr.startswith(f"warning: data.{key} is {value}, ")
    succeed("evaluate", tuned(toys), "--set", "data.mean=[0,0,0]", "--set", "data.std=[1,1,1]")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("evaluate", "Missing argument 'MODEL'"),
        ("evaluate {tmp}", "not a run directory"),
        ("evaluate {tmp}/nowhere", "no such file"),
        ("evaluate {tmp}/nowhere.onnx", "no such file"),
        ("evaluate {tmp}/file", "{tmp}/file: "),
        ("evaluate {tmp}/text.onnx", "not a model that onnxruntime can load"),
        ("evaluate {tmp}/half.onnx", "not a model that onnxruntime can load"),
        ("evaluate {tmp}/empty.onnx", "text.onnx: |empty.onnx: "),
        ("evaluate {tmp}/folder.onnx", "not a run directory"),
        ("evaluate {toys}/model.onnx --set data.image_size=16", "data.image_size is 16"),
        ("evaluate {toys}/model.onnx --set data.mean=[0,0,1]", "data.mean is [0.0, 0.0, 1.0]"),
        ("evaluate {toys}/model.onnx --set data.dataset=imagefolder", "data.root is unset"),
        ("evaluate {toys}/model.onnx --set schedule.epochs=1", "no effect here"),
        ("evaluate {toys}/model.onnx --recipe nowhere", "no such recipe file"),
        ("evaluate {toys}/model.onnx --recipe nowhere", "`qat recipe list`"),
        ("evaluate ''", "'MODEL': is empty; give a path"),
        ("evaluate {toys}/model.onnx --set ''", "'--set': is empty; write section.key=value"),
        ("evaluate {toys}/model.onnx --recipe ''", "'--recipe': is empty; give a recipe file or a name from"),
        ("evaluate {toys}/float.safetensors --set data.eval_batch_size=0", "data.eval_batch_size"),
        ("evaluate {toys}/float.safetensors extra", "unexpected extra argument"),
    ],
)
def test_a_wrong_evaluation_ends_with_2_and_says_why(
    toys: Path, tmp_path: Path, arguments: str, part: str
) -> None:
    (tmp_path / "file").write_text("hello", encoding="utf-8")
    (tmp_path / "text.onnx").write_text("hello", encoding="utf-8")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "folder.onnx").mkdir()
    model = (toys / "model.onnx").read_bytes()
    (tmp_path / "half.onnx").write_bytes(model[: len(model) // 2])
    message = fail(2, *(word.format(toys=toys, tmp=tmp_path) for word in shlex.split(arguments)))
    assert any(one.format(tmp=tmp_path) in message for one in part.split("|"))


def test_data_of_other_classes_does_not_fit(toys: Path, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", train=1, test=1)
    options = settings(["data.dataset=imagefolder", f"data.root={root}"])
    for model in (toys / "model.onnx", toys / "float.safetensors"):
        assert "the data has 2 classes, the network 10" in fail(2, "evaluate", model, *options)
