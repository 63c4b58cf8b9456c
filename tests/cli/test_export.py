"""qat export: what it writes, and how each wrong input ends."""

from __future__ import annotations

import copy
import errno
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from qat_export.graphs.portable import emit_portable
from qat_export.integer.file import load_network, save_network
from qat_export.integer.network import IntegerNetwork

from qat.checkpoints.format import load_checkpoint, save_checkpoint
from qat.checkpoints.loading import build
from qat.cli.group import main
from qat.commands import exporting
from qat.models.bnext import set_temperature
from tests.helpers.cases import fast_where
from tests.helpers.native_models import KERNELS
from tests.helpers.network_changes import differences
from tests.helpers.toy_runs import fail, qat, succeed, tune, tuned

FLOAT, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
#: The options of each form of an integer model, and its input: type and shape behind the batch.
FORMS: dict[str, tuple[str, int, list[int]]] = {
    "float32": ("", FLOAT, [3, 8, 8]),
    "uint8 NCHW": ("--input uint8", UINT8, [3, 8, 8]),
    "uint8 NHWC": ("--input uint8 --layout nhwc", UINT8, [8, 8, 3]),
    "native": ("--target native", FLOAT, [3, 8, 8]),
    "native uint8 NHWC": ("--target native --input uint8 --layout NHWC", UINT8, [8, 8, 3]),
    "strict": ("--strict-onnx", FLOAT, [3, 8, 8]),
    "strict uint8 NHWC": ("--strict-onnx --input uint8 --layout NHWC", UINT8, [8, 8, 3]),
}


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def accuracy(path: Path) -> dict[str, Any]:
    return json.loads(succeed("evaluate", path, "--json"))


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, hidden files too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Where it goes


def test_export_without_a_path_takes_the_newest_run_and_writes_beside_its_checkpoint(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        succeed(*tune(toys, Path("runs")))
    text = succeed("export", "--onnx")
    older, newer = sorted(Path("runs").iterdir(), key=lambda run: (run / "summary.json").stat().st_mtime_ns)
    assert text.splitlines()[-1].startswith(f"{newer / 'model.onnx'}: ")
    assert text.splitlines()[-1].endswith("MB, verified")
    assert not (older / "model.onnx").exists()
    again = newer / "again" / "model.onnx"
    again.parent.mkdir()
    succeed("export", "--onnx", again, "--run", newer)
    assert (newer / "model.onnx").read_bytes() == again.read_bytes()


def test_the_float_baseline_has_a_name_of_its_own_beside_the_checkpoint(toys: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned(toys).parent, tmp_path / "run")
    succeed("export", "--onnx", "--run", tmp_path / "run")
    before = files(tmp_path)
    text = succeed("export", "--onnx", "--float32", "--run", tmp_path / "run")
    assert text.splitlines()[-1].startswith(f"{tmp_path / 'run' / 'float32.onnx'}: ")
    after = files(tmp_path)
    assert after.pop("run/float32.onnx")
    assert after == before


def test_a_model_for_another_image_size_is_evaluated_at_that_size(toys: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.ONNX"
    succeed("export", "--onnx", path, "--checkpoint", tuned(toys), "--image-size", "16")
    succeed("evaluate", path)
    assert metadata(path)["image_size"] == "16"
    assert "data.image_size is 8" in fail(2, "evaluate", path, "--set", "data.image_size=8")


# Forms


@pytest.fixture(scope="module")
def accuracies(toys: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the exported model and of the checkpoint behind it."""
    return accuracy(toys / "model.onnx"), accuracy(tuned(toys))


@pytest.mark.parametrize("form", fast_where(["float32", "uint8 NHWC", "native uint8 NHWC"], FORMS))
def test_each_form_takes_its_images_and_has_the_accuracy_of_the_checkpoint(
    toys: Path, tmp_path: Path, accuracies: tuple[dict[str, Any], dict[str, Any]], form: str
) -> None:
    options, element, shape = FORMS[form]
    if "native" in options and not KERNELS:
        pytest.skip("the native operators are not built here: make native")
    path = tmp_path / "m.onnx"
    text = succeed("export", "--onnx", path, "--checkpoint", tuned(toys), *options.split())
    (image,) = onnx.load(path).graph.input
    tensor = image.type.tensor_type
    assert (tensor.elem_type, [dim.dim_value for dim in tensor.shape.dim][1:]) == (element, shape)
    kind = f"{'uint8' if element == UINT8 else 'float32'} {'NHWC' if shape[-1] == 3 else 'NCHW'}"
    assert metadata(path)["input"] == kind
    assert metadata(path)["exporter"].startswith("bnext-qat ")
    found, (of_the_model, of_the_checkpoint) = accuracy(path), accuracies
    assert found == of_the_model
    assert found["top1"] == of_the_checkpoint["top1"]
    assert text.splitlines()[-1] == f"{path}: {path.stat().st_size / 1e6:.2f} MB, verified"


def test_a_strict_model_has_no_quantized_convolution_and_other_models_do(toys: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    succeed("export", "--onnx", path, "--checkpoint", tuned(toys), "--strict-onnx")

    def quantized(model: Path) -> set[str]:
        operators = {node.op_type for node in onnx.load(model).graph.node}
        return operators & {"QLinearConv", "ConvInteger", "QuantizeLinear"}

    assert quantized(path) == set()
    assert "QLinearConv" in quantized(toys / "model.onnx")


@pytest.mark.parametrize("source", ["tuned", "float-rest"])
def test_the_float_baseline_of_any_checkpoint_has_the_accuracy_of_its_float_network(
    toys: Path, tmp_path: Path, source: str
) -> None:
    path, checkpoint = tmp_path / "f.onnx", toys / "float.safetensors" if source != "tuned" else tuned(toys)
    text = succeed("export", "--onnx", path, "--float32", "--checkpoint", checkpoint)
    assert "same top-1" in text
    assert "logits equal to the reference" not in text
    model = onnx.load(path)
    assert {tensor.data_type for tensor in model.graph.initializer} <= {FLOAT, onnx.TensorProto.INT64}
    # Fine-tuning of no epochs leaves the parameters alone. Sums in another order may tip one image.
    assert accuracy(path)["top1"] == pytest.approx(accuracy(toys / "float.safetensors")["top1"], abs=0.5)
    found = metadata(path)
    assert found["format"] == "bnext-qat float32 1"
    assert ("accuracy" in found) == (source == "float-rest")  # the other one's is that of the integers


def test_a_float_baseline_that_is_not_binary_yet_is_exported_with_a_warning(
    toys: Path, tmp_path: Path
) -> None:
    stored = load_checkpoint(toys / "float.safetensors")
    model = build(stored)
    set_temperature(model, 0.3)
    save_checkpoint(tmp_path / "soft.safetensors", model, recipe=stored.recipe)
    result = qat(
        "export", "--onnx", tmp_path / "f.onnx", "--float32", "--checkpoint", tmp_path / "soft.safetensors"
    )
    assert result.exit_code == 0
    assert result.stderr == (
        f"warning: {tmp_path / 'soft.safetensors'}: the weights in use are not binary: the temperature is "
        "0.3, binary means below 1e-7\n"
    )


def test_the_integer_network_is_the_one_that_the_model_was_made_from(toys: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "n.safetensors"
    path.parent.mkdir()
    arguments = ["export", "--onnx", tmp_path / "m.onnx", "--checkpoint", tuned(toys)]
    text = succeed(*arguments, "--integer-network", path)
    assert f"{path}: {path.stat().st_size / 1e6:.2f} MB, integer network" in text.splitlines()
    network = load_network(path)
    assert emit_portable(network).SerializeToString(deterministic=True) == (tmp_path / "m.onnx").read_bytes()
    # An older one gives way.
    save_network(network.__class__(**{**vars(network), "metadata": {}}), path)
    succeed(*arguments, "--integer-network", path)
    assert not list(differences(load_network(path), network))
    assert sorted(files(tmp_path)) == ["m.onnx", "new/n.safetensors"]


# What is shown


def test_layers_are_listed_when_asked_for(toys: Path, tmp_path: Path) -> None:
    arguments = ["export", "--onnx", tmp_path / "m.onnx", "--checkpoint", tuned(toys)]
    short, long = succeed(*arguments), succeed(*arguments, "--layers")
    lines = {line.split()[0]: line.split() for line in long.splitlines() if line.strip()}
    assert lines["feature.1.Attention"][1:7] == ["bias", "3×3", "8×8×3×3", "1", "1", "72"]
    assert lines["fc"][1:5] == ["classifier", "10×16", "8", "160"]
    assert [name for name in lines if name.endswith(".se")] == [
        f"feature.{place}.se" for place in ("1.Attention", "1.FFN", "2.Attention", "2.FFN_1", "2.FFN_2")
    ]
    assert "feature.1.Attention" not in short
    assert "  5 binary convolutions, 1,344 weights at 1 bit" in short.splitlines()


def test_the_tables_fit_eighty_columns_with_a_line_per_row(toys: Path, tmp_path: Path) -> None:
    text = succeed("export", "--onnx", tmp_path / "m.onnx", "--checkpoint", tuned(toys))
    *lines, written = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert str(tmp_path) in written
    rows = [line.split() for line in lines]
    assert ["binary", "convolutions", "50,688", "100", "%", "100", "%", "0"] in rows
    assert ["same", "top-1", "100.00", "%", "≥", "99.9", "%"] in rows
    # Constants, each level of tensors, and the logits once more.
    assert len([row for row in rows if row[-2:] == ["%", "0"]]) == 13


def test_help_fits_eighty_columns_and_says_what_each_option_is_for() -> None:
    text = succeed("export", "--help")
    assert max(map(len, text.splitlines())) <= 80
    for word in (
        *("--onnx", "--run", "--checkpoint", "--runs", "--image-size", "--set", "--input", "[NCHW|NHWC]"),
        *("--strict-onnx", "--float32", "--integer-network", "--layers"),
    ):
        assert word in text, word
    export = main.commands["export"]
    assert all(getattr(option, "help", "") for option in export.params if not getattr(option, "hidden", True))


# A result that is not good enough


def test_a_model_that_differs_from_its_network_leaves_the_earlier_files_alone(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, network_path = tmp_path / "m.onnx", tmp_path / "n.safetensors"
    arguments = ["export", "--onnx", path, "--checkpoint", tuned(toys), "--integer-network", network_path]
    succeed(*arguments)
    good = files(tmp_path)

    def damaged(network: IntegerNetwork, **options: Any) -> onnx.ModelProto:
        wrong = copy.deepcopy(network)
        multiplier = wrong.head.classifier.multiplier
        multiplier[:] = multiplier[::-1].copy() * np.float32(1.5)
        return emit_portable(wrong, **options)

    monkeypatch.setattr(exporting, "emit_portable", damaged)
    result = qat(*arguments)
    assert result.exit_code == 1
    warning, message = result.stderr.splitlines()
    assert warning == f"warning: {path}: not written"
    assert message.startswith("error: the exported model is not exact: constants: ")
    assert "in logits, input" in message
    assert "MB" not in result.stdout
    assert files(tmp_path) == good


def test_a_float_baseline_that_differs_from_its_network_is_not_written(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emit_float = exporting.emit_float

    def damaged(model: Any, **options: Any) -> onnx.ModelProto:
        wrong = copy.deepcopy(model)
        wrong.fc.bias.data[3] += 5
        return emit_float(wrong, **options)

    monkeypatch.setattr(exporting, "emit_float", damaged)
    path = tmp_path / "f.onnx"
    message = fail(1, "export", "--onnx", path, "--float32", "--checkpoint", toys / "float.safetensors")
    assert f"warning: {path}: not written\n" in message
    assert "error: the exported model does not match: top-1 agrees on " in message
    assert files(tmp_path) == {}


# Wrong input


def test_a_trunk_left_in_float_is_not_exported_and_the_group_is_named(toys: Path, tmp_path: Path) -> None:
    arguments = tune(toys, tmp_path)
    arguments[1:1] = ["--recipe", "tiny_int8_paper"]
    succeed(*arguments)
    message = fail(2, "export", "--onnx", "--runs", tmp_path)
    assert "trunk" in message
    assert "float" in message
    assert not list(tmp_path.glob("*/model.onnx"))
    # Its float network can be measured all the same.
    succeed("export", "--onnx", "--float32", "--runs", tmp_path)
    assert list(tmp_path.glob("*/float32.onnx"))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("export", "say what to export: --onnx"),
        ("export --layers --runs {toys}/runs", "say what to export: --onnx"),
        ("export --onnx '' --runs {toys}/runs", "'--onnx': is empty"),
        ("export --onnx --runs {toys}/runs extra", "unexpected extra argument"),
        ("export --onnx --runs {tmp}/nowhere", "no finished finetune run here"),
        ("export --onnx --run {tmp}/nowhere", "no such run directory"),
        ("export --onnx --run {tmp}", "not a run directory"),
        ("export --onnx --run {tmp} --checkpoint {toys}/float.safetensors", "exclude each other"),
        ("export --onnx --checkpoint {toys}/float.safetensors", "quantize it without training"),
        ("export --onnx --checkpoint {toys}/float.safetensors", "--float32"),
        ("export --onnx --checkpoint {toys}/model.onnx", "not a checkpoint"),
        ("export --onnx --checkpoint {tmp}", "is a folder"),
        ("export --onnx --checkpoint {tmp}/nowhere", "no such file"),
        ("export --onnx {tmp}/model.bin --runs {toys}/runs", "does not end in .onnx"),
        ("export --onnx {tuned} --runs {toys}/runs", "does not end in .onnx"),
        ("export --onnx {tmp}/file/m.onnx --runs {toys}/runs", "{tmp}/file/m.onnx: cannot be written"),
        ("export --onnx {tmp}/folder.onnx --runs {toys}/runs", "folder.onnx: cannot be written: it is a fo"),
        ("export --onnx {tmp}/folder.onnx --float32 --runs {toys}/runs", "it is a folder"),
        ("export --onnx {tmp}/" + "x" * 300 + ".onnx --runs {toys}/runs", "too long"),
        ("export --onnx /proc/m.onnx --runs {toys}/runs", "/proc/m.onnx: cannot be written"),
        ("export --onnx --runs {toys}/runs --image-size 0", "--image-size"),
        ("export --onnx --runs {toys}/runs --image-size 7", "7 is not in the range 8<=x<=4096"),
        ("export --onnx --runs {toys}/runs --image-size 100000", "100000 is not in the range"),
        ("export --onnx --runs {toys}/runs --image-size many", "--image-size"),
        ("export --onnx --runs {toys}/runs --input int8", "'int8' is not one of 'float32', 'uint8'"),
        ("export --onnx --runs {toys}/runs --layout nhwc", "--layout NHWC needs --input uint8"),
        ("export --onnx --runs {toys}/runs --input uint8 --layout NWHC", "'NWHC' is not one of"),
        ("export --onnx --runs {toys}/runs --float32 --input uint8", "--float32 and --input uint8 exclude"),
        ("export --onnx --runs {toys}/runs --float32 --strict-onnx", "--float32 and --strict-onnx exclude"),
        (
            "export --onnx --runs {toys}/runs --float32 --target native",
            "--float32 and --target native exclude",
        ),
        ("export --onnx --strict-onnx --target native", "--strict-onnx and --target native exclude"),
        ("export --onnx --target nativ", "'nativ' is not one of 'portable', 'native'"),
        ("export --onnx --runs {toys}/runs --float32 --layers", "--float32 and --layers exclude"),
        (
            "export --onnx --runs {toys}/runs --float32 --integer-network {tmp}/n.safetensors",
            "--float32 and --integer-network exclude",
        ),
        ("export --onnx --runs {toys}/runs --integer-network ''", "'--integer-network': is empty"),
        ("export --onnx --runs {toys}/runs --integer-network {tmp}/n.npz", "does not end in .safetensors"),
        (
            "export --onnx {tmp}/m.onnx --runs {toys}/runs --integer-network {tuned}",
            "{tuned}: not replaced: it is no integer network",
        ),
        (
            "export --onnx {tmp}/m.onnx --runs {toys}/runs --integer-network {tmp}/folder.safetensors",
            "folder.safetensors: cannot be written: it is a folder",
        ),
        (
            "export --onnx {tmp}/m.onnx --runs {toys}/runs --integer-network {tmp}/file/n.safetensors",
            "{tmp}/file/n.safetensors: cannot be written",
        ),
        ("export --onnx --runs {toys}/runs --set data.image_size=16", "say it with --image-size"),
        ("export --onnx --runs {toys}/runs --set data.std=[1,1,2]", "fixed by the checkpoint"),
        ("export --onnx --runs {toys}/runs --set data.mean=[0,0,1]", "fixed by the checkpoint"),
        ("export --onnx --runs {toys}/runs --set data.mean.0=1", "fixed by the checkpoint"),
        ("export --onnx --runs {toys}/runs --set 'data={{image_size: 16}}'", "set its keys one by one"),
        ("export --onnx --runs {toys}/runs --set data", "has no '='"),
        ("export --onnx --runs {toys}/runs --set optimizer.lr=1", "no effect here"),
        ("export --onnx --runs {toys}/runs --set data.datasets=x", "did you mean 'dataset'"),
        ("export --onnx --runs {toys}/runs --set data.dataset=imagefolder", "data.root is unset"),
        ("export --onnx --run ''", "'--run': is empty"),
        ("export --onnx --checkpoint ''", "'--checkpoint': is empty"),
        ("export --onnx --runs ''", "'--runs': is empty"),
        ("export --onnx --set ''", "'--set': is empty"),
    ],
)
def test_a_wrong_export_ends_with_2_and_leaves_every_file_alone(
    toys: Path, tmp_path: Path, arguments: str, part: str
) -> None:
    (tmp_path / "file").write_text("hello", encoding="utf-8")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    before = files(toys), files(tmp_path)
    names = {"toys": toys, "tmp": tmp_path, "tuned": tuned(toys)}
    message = fail(2, *(word.format(**names) for word in shlex.split(arguments)))
    assert part.format(**names) in message
    assert (files(toys), files(tmp_path)) == before


def test_a_full_disk_is_named_and_leaves_nothing_behind(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "m.onnx"
    for options in ([], ["--float32"], ["--integer-network", tmp_path / "n.safetensors"]):
        message = fail(2, "export", "--onnx", path, "--checkpoint", tuned(toys), *options)
        assert "cannot be written: No space left on device" in message
        assert "unverified" not in message
    assert files(tmp_path) == {}
