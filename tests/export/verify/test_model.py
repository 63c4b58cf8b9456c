"""Loading exported models: what is refused, what they take, and the data that fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from qat_export.graphs.float32 import emit_float
from qat_export.graphs.portable import emit_portable
from qat_export.verify.model import OnnxModel, input_array, open_session

from qat.data.split import MemorySplit
from qat.errors import CheckpointError, DataError
from qat.evaluation import evaluate, predictor
from qat.recipe.schema import Data
from tests.helpers.networks import MEAN, STD, float_network, ordinary, pixels, saved

DATA = Data(image_size=16, mean=MEAN, std=STD, eval_batch_size=16)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(ordinary()[2], tmp_path_factory.mktemp("model") / "model.onnx")


# Loading.


def test_a_loaded_model_runs_and_knows_its_size(path: Path) -> None:
    model = OnnxModel(path)
    assert (model.image_size, model.num_classes) == (16, 10)
    assert model.metadata["run"] == "a test"
    images = pixels(0, 3, 16)
    logits = model(images)
    assert (logits.shape, logits.dtype) == ((3, 10), torch.float32)
    (as_written,) = open_session(path, path, optimize=False).run(["logits"], {"image": images.numpy()})
    assert np.array_equal(logits.numpy(), as_written)


def broken(kind: str, path: Path, folder: Path) -> Path:
    target, content = folder / f"{kind}.onnx", path.read_bytes()
    if kind == "directory":
        target.mkdir()
    elif kind == "empty":
        target.write_bytes(b"")
    elif kind == "random":
        target.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "text":
        target.write_text("accuracy: 99\n")
    elif kind.startswith("truncated"):
        target.write_bytes(content[: int(len(content) * float(kind.split()[1]))])
    return target


KINDS = ["absent", "directory", "empty", "random", "text", "truncated 0.1", "truncated 0.5", "truncated 0.99"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_whole_model_is_refused_naming_the_file(kind: str, path: Path, tmp_path: Path) -> None:
    target = broken(kind, path, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        OnnxModel(target)
    assert str(caught.value).startswith(f"{target}: ")
    assert "\n" not in str(caught.value)


def foreign(input_name: str = "image", output: str = "logits", side: int | str = 16) -> onnx.ModelProto:
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", [input_name], [output])],
        "foreign",
        [info(input_name, onnx.TensorProto.FLOAT, ["n", 3, side, side])],
        [info(output, onnx.TensorProto.FLOAT, ["n", 3, side, side])],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=7)


@pytest.mark.parametrize("names", [("image", "logits"), ("x", "y"), ("image", "y")])
def test_a_model_of_another_tool_is_refused(names: tuple[str, str], tmp_path: Path) -> None:
    target = saved(foreign(*names), tmp_path / "foreign.onnx")
    with pytest.raises(CheckpointError, match="not exported by this tool"):
        OnnxModel(target)


def test_a_model_with_our_metadata_but_no_fixed_size_is_refused(tmp_path: Path) -> None:
    model = foreign(side="side")
    onnx.helper.set_model_props(model, {"format": "bnext-qat portable 1"})
    with pytest.raises(CheckpointError):
        OnnxModel(saved(model, tmp_path / "sizeless.onnx"))


# What a model takes.


@pytest.mark.parametrize("kind", ["uint8 NCHW", "uint8 NHWC"])
def test_a_model_of_raw_pixels_is_given_pixels_and_has_the_logits_of_the_other_kind(
    kind: Any, path: Path, tmp_path: Path
) -> None:
    model = OnnxModel(saved(emit_portable(ordinary()[1], input_kind=kind), tmp_path / "m.onnx"))
    assert (model.takes_pixels, model.input_kind) == (True, kind)
    assert (model.image_size, model.num_classes) == (16, 10)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=generator)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    expected = OnnxModel(path)((images.float() / 255 - mean) / std)
    assert torch.equal(model(images), expected)
    with pytest.raises(ValueError, match=rf"input '{kind}' was given torch\.float32 images"):
        model(images.float())


def test_raw_pixels_for_a_model_of_normalized_images_are_refused(path: Path) -> None:
    model = OnnxModel(path)
    assert (model.takes_pixels, model.input_kind) == (False, "float32 NCHW")
    with pytest.raises(ValueError, match=r"input 'float32 NCHW' was given torch\.uint8 images"):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_the_array_for_the_runtime_has_the_model_s_type_and_layout() -> None:
    pixels = torch.arange(24, dtype=torch.uint8).view(1, 3, 2, 4)
    assert input_array(pixels, "uint8 NCHW").tolist() == pixels.tolist()
    last = input_array(pixels, "uint8 NHWC")
    assert (last.shape, last.dtype, last.flags.c_contiguous) == ((1, 2, 4, 3), np.uint8, True)
    assert last[0, 1, 2].tolist() == pixels[0, :, 1, 2].tolist()
    halves = input_array(pixels.half(), "float32 NCHW")
    assert (halves.dtype, halves.tolist()) == (np.float32, pixels.tolist())


def with_input(model: onnx.ModelProto, text: str | None) -> onnx.ModelProto:
    """``model`` with another metadata property ``input``, or none."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    metadata = {entry.key: entry.value for entry in model.metadata_props if entry.key != "input"}
    del copy.metadata_props[:]
    onnx.helper.set_model_props(copy, metadata if text is None else metadata | {"input": text})
    return copy


def test_a_model_that_does_not_say_what_it_takes_takes_normalized_images(tmp_path: Path) -> None:
    model = OnnxModel(saved(with_input(ordinary()[2], None), tmp_path / "m.onnx"))
    assert model.input_kind == "float32 NCHW"


@pytest.mark.parametrize(
    ("real", "said", "message"),
    [
        (
            "float32 NCHW",
            "uint8 NHCW",
            r"metadata 'input' is 'uint8 NHCW', allowed: .*\(did you mean 'uint8 N",
        ),
        ("float32 NCHW", "", "metadata 'input' is ''"),
        ("float32 NCHW", "uint8 NCHW", r"'input' is 'uint8 NCHW', the graph takes tensor\(float\)"),
        ("uint8 NCHW", None, r"'input' is 'float32 NCHW', the graph takes tensor\(uint8\)"),
        ("uint8 NCHW", "uint8 NHWC", "are not uint8 NHWC images and logits of fixed sizes"),
        ("uint8 NHWC", "uint8 NCHW", "are not uint8 NCHW images and logits of fixed sizes"),
    ],
)
def test_an_input_that_is_not_what_the_metadata_say_is_refused(
    real: Any, said: str | None, message: str, tmp_path: Path
) -> None:
    target = saved(with_input(emit_portable(ordinary()[1], input_kind=real), said), tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match=message) as caught:
        OnnxModel(target)
    assert str(caught.value).startswith(f"{target}: ")


def test_a_model_that_fails_while_it_runs_is_an_error_of_ours(path: Path) -> None:
    model = OnnxModel(path)
    with pytest.raises(CheckpointError, match="onnxruntime can't run it: ") as caught:
        model(torch.zeros(2, 3, 8, 8))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_pixel_models_and_float_exports_are_evaluated_like_the_networks_they_came_from(
    path: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8, generator=generator)
    split = MemorySplit([str(i) for i in range(10)], images, torch.arange(40) % 10)
    integer = evaluate(OnnxModel(path), split, DATA)
    for kind in ("uint8 NCHW", "uint8 NHWC"):
        exported = emit_portable(ordinary()[1], input_kind=kind)
        assert evaluate(OnnxModel(saved(exported, tmp_path / f"{kind}.onnx")), split, DATA) == integer
    network = float_network()
    exported = emit_float(network, image_size=16, mean=MEAN, std=STD)
    found = evaluate(OnnxModel(saved(exported, tmp_path / "float.onnx")), split, DATA)
    expected = evaluate(predictor(network), split, DATA)
    assert (found.top1, found.n) == (expected.top1, 40)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)


# Data.


def test_fitting_data_are_accepted(path: Path) -> None:
    OnnxModel(path).check_data(DATA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 32}, r"data\.image_size is 32.* takes 16×16"),
        ({"mean": (0.0, 0.0, 0.0)}, r"data\.mean is \[0\.0, 0\.0, 0\.0\]"),
        ({"std": (0.25, 0.22, 0.31)}, r"data\.std is"),
    ],
)
def test_data_of_another_size_or_normalization_are_refused_by_key(
    change: dict[str, object], message: str, path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        OnnxModel(path).check_data(DATA.model_copy(update=change))


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "3",
        "null",
        '{"mean": [0, 0, 0]}',
        '{"mean": 1, "std": 1}',
        '{"mean": [0, 0], "std": [1, 1]}',
    ],
)
def test_a_damaged_normalization_is_refused_as_such(text: str | None, path: Path) -> None:
    model = OnnxModel(path)
    model.metadata.pop("normalization")
    if text is not None:
        model.metadata["normalization"] = text
    with pytest.raises(CheckpointError, match="'normalization' is missing or damaged"):
        model.check_data(DATA)
