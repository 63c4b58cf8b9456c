"""The whole way: fine-tune, export, evaluate; on the shipped checkpoint, and on a folder of images."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch

from qat.checkpoints.format import load_checkpoint
from qat.checkpoints.loading import build
from qat.data.loading import load_split
from qat.evaluation import evaluate, predictor
from qat.models.bnext import binary_convolutions
from qat.recipe.files import recipes_dir
from qat.recipe.loading import load_recipe, resolve_checkpoint
from qat.runs import newest_run
from qat.train.pretraining import pretrain
from tests.helpers.cases import slow
from tests.helpers.checkpoints import WIDTHS, toy, training_checkpoint
from tests.helpers.cifar10 import cifar10
from tests.helpers.image_folders import photographs
from tests.helpers.toy_runs import Silent, finetune_arguments, image_folder, pretrain_toy, settings, succeed

DIGITS, CIFAR10 = (
    recipes_dir() / "checkpoints" / f"bnext_tiny_{name}.safetensors" for name in ("digits", "cifar10")
)
#: Largest loss of top-1 (points) that calibrated int8 may have against float rest on the 360 test digits,
#: without any fine-tuning: 7 images.
BAND = 2.0


def evaluated(*arguments: object) -> dict[str, float]:
    content: dict[str, float] = json.loads(succeed("evaluate", *arguments, "--json"))
    return content


@pytest.mark.parametrize("path", [DIGITS, slow(CIFAR10)], ids=["digits", "cifar10"])
def test_a_shipped_checkpoint_is_binary_and_small(path: Path) -> None:
    assert path.stat().st_size <= 10e6
    stored = load_checkpoint(path)
    assert stored.recipe is not None
    assert stored.quantization is None
    model = build(stored)
    convolutions = binary_convolutions(model)
    assert len(convolutions) == 31
    for name, conv in convolutions.items():
        assert float(conv.temperature) < 1e-7, name
        assert set(conv.effective_weight().unique().tolist()) == {-1.0, 1.0}, name
        assert conv.weight.abs().unique().tolist() == [1.0], name  # the file has signs, nothing more


def test_the_shipped_network_of_digits_is_good() -> None:
    data = load_recipe("tiny_int8").recipe.data
    model = build(load_checkpoint(DIGITS))
    accuracy = evaluate(predictor(model), load_split(data, "test"), data)
    assert accuracy.n == 360
    assert accuracy.top1 >= 98.5


def test_the_shipped_network_of_cifar10_is_good() -> None:
    loaded = load_recipe("tiny_int8_cifar10")
    model = build(load_checkpoint(resolve_checkpoint(loaded)))
    # 76.4 % of all 8,000, less more than two standard deviations of 1,000.
    assert evaluate(predictor(model), cifar10(1000), loaded.recipe.data).top1 >= 73.0


# CI tunes and exports this recipe in `make gate`; that run, checkpoint and model agree, and where an export
# without a path goes, test_cli_evaluate.py and test_cli_export.py hold for toys.
@pytest.mark.exhaustive
def test_the_default_recipe_gives_a_model_that_answers_as_its_network_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The interpreter takes half a second per image; its equality has tests of its own.
    monkeypatch.setattr("qat_export.verify.agreement.REFERENCE_IMAGES", 2)
    short = ["schedule.epochs=0", "schedule.calibration_batches=4", "threads=1", "device=cpu"]
    succeed("finetune", "--recipe", "tiny_int8", *settings(short))
    printed = succeed("export", "--onnx")
    run = newest_run(Path("runs"))
    model = run.path / "model.onnx"
    assert printed.splitlines()[-1].startswith(f"{model}: ")
    assert printed.splitlines()[-1].endswith(" MB, verified")

    found = [evaluated(path) for path in (run.path, run.best, model)]
    assert len({(one["top1"], one["n"]) for one in found}) == 1
    summary = run.summary()
    assert found[0]["top1"] == summary["int8"]["top1"]
    assert summary["float"]["top1"] >= 98.5
    assert abs(summary["int8"]["top1"] - summary["float"]["top1"]) <= BAND

    proto = onnx.load(model)
    onnx.checker.check_model(proto, full_check=True)
    assert {opset.domain for opset in proto.opset_import} <= {"", "ai.onnx"}
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert not proto.functions
    assert model.stat().st_size <= 10e6


def test_a_folder_of_images_goes_the_whole_way(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    data = [
        "model.widths=[8,8,16]",
        "model.num_classes=2",
        "data.dataset=imagefolder",
        f"data.root={root}",
        "data.image_size=16",
        "data.batch_size=7",
        "data.train_split=train",
        "data.test_split=validation",
        "data.augment.crop=[0.5,1.0]",
        "data.augment.flip=true",
        "threads=1",
        "device=cpu",
    ]
    start = [*data, f"output.dir={tmp_path / 'pretrain'}", "schedule.epochs=3", "data.augment.scale=null"]
    checkpoint = pretrain(load_recipe("tiny_digits_pretrain", start), Silent()).best
    succeed(*finetune_arguments(tmp_path / "runs", checkpoint, *data, "schedule.epochs=1"))
    run = newest_run(tmp_path / "runs")
    accuracy = run.summary()["int8"]
    assert accuracy["n"] == 12

    succeed("export", "--onnx", "--runs", tmp_path / "runs")
    model = run.path / "model.onnx"
    assert json.loads({p.key: p.value for p in onnx.load(model).metadata_props}["class_names"]) == [
        "dark",
        "light",
    ]
    for path in (run.path, run.best, model):
        assert evaluated(path)["top1"] == accuracy["top1"]

    # Moved, the images are found again with --set; elsewhere there may be others.
    moved = root.rename(tmp_path / "moved")
    for path in (run.path, model):
        assert evaluated(path, "--set", f"data.root={moved}")["top1"] == accuracy["top1"]
    other = image_folder(tmp_path / "other", train=1, test=2)
    assert evaluated(model, "--set", f"data.root={other}")["n"] == 4
    again = tmp_path / "again.onnx"
    succeed("export", "--onnx", again, "--run", run.path, "--set", f"data.root={moved}")
    assert again.read_bytes() == model.read_bytes()


def test_own_photographs_from_a_published_checkpoint_of_1000_classes_go_the_whole_way(tmp_path: Path) -> None:
    """The recipe for it, made small: three classes, weights in the authors' training format."""
    root = photographs(tmp_path / "photographs")
    state = toy(num_classes=1000).state_dict()
    torch.save(training_checkpoint(state), tmp_path / "published.pth.tar")
    options = [
        f"model.widths={list(WIDTHS)}",
        f"model.checkpoint={tmp_path / 'published.pth.tar'}",
        f"data.root={root}",
        *("data.image_size=32", "data.resize=36", "data.batch_size=12", "data.workers=0"),
        *("schedule.float_epochs=6", "optimizer.lr=1e-2"),
        *("schedule.epochs=1", "schedule.calibration_batches=2"),
        *("threads=1", "device=cpu", f"output.dir={tmp_path / 'runs'}"),
    ]
    printed = succeed("finetune", "--recipe", "tiny_int8_transfer", *settings(options))
    assert printed.count("the classifier starts anew: its classifier tells 1000 classes apart") == 1
    run = newest_run(tmp_path / "runs")
    tuned = build(load_checkpoint(run.best))
    assert (tuned.architecture.num_classes, tuned.architecture.stem_stride) == (3, 2)
    for name, convolution in binary_convolutions(tuned).items():
        assert torch.equal(convolution.weight >= 0, state[f"{name}.weight"] >= 0), name
    # Colours tell the classes apart, which a trained classifier sees. What that gained is not quantization's.
    summary = run.summary()
    assert summary["float"]["top1"] >= 60.0
    assert summary["float"]["top1"] == evaluated(run.float_stage.best)["top1"]

    printed = succeed("export", "--onnx", "--runs", tmp_path / "runs")
    assert printed.splitlines()[-1].endswith(" MB, verified")
    assert evaluated(run.path / "model.onnx")["top1"] == summary["int8"]["top1"]
    succeed("report", run.path)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "new, for 3 classes" in page
    # The run's own recipe repeats it.
    again = [*settings([f"output.dir={tmp_path / 'again'}"])]
    succeed("finetune", "--recipe", run.path / "recipe.yaml", *again)
    repeated = newest_run(tmp_path / "again").summary()
    assert [repeated[key] for key in ("float", "int8")] == [summary[key] for key in ("float", "int8")]


def test_tuning_learns_on_top_of_calibration(tmp_path: Path) -> None:
    """A toy that knows little: its training loss falls from the first epoch to the third."""
    checkpoint = pretrain_toy(tmp_path / "pretrain")
    options = ("schedule.epochs=3", "data.batch_size=160", "optimizer.lr=1e-2", "distillation.teacher=none")
    succeed(*finetune_arguments(tmp_path / "runs", checkpoint, *options))
    run = newest_run(tmp_path / "runs")
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[2] < losses[0]
    assert run.summary()["int8"]["top1"] > run.summary()["float"]["top1"]
    assert torch.isfinite(torch.tensor(losses)).all()
