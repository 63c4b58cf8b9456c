"""Models of any origin: what is run, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from qat_export.bench.any_model import AnyModel

from qat.errors import CheckpointError, QatError, VerificationError
from tests.helpers.tiny_models import Shape, image_model, save

# What is run.


@pytest.mark.parametrize(
    ("shape", "fed"),
    [
        (("batch", 3, 8, 6), (2, 3, 8, 6)),
        ((None, 3, 8, 6), (2, 3, 8, 6)),
        ((2, 1, 8, 6), (2, 1, 8, 6)),
        (("batch", 8, 6, 3), (2, 8, 6, 3)),
        (("batch", 3, "height", "width"), (2, 3, 12, 12)),
        (("batch", "height", "width", 4), (2, 12, 12, 4)),
        (("batch", 3, 8, 3), (2, 3, 8, 3)),
    ],
)
def test_images_fit_the_input(shape: Shape, fed: tuple[int, ...], tmp_path: Path) -> None:
    resolution = 12 if "height" in shape else None
    model = AnyModel(image_model(tmp_path / "model.onnx", shape), batch=2, resolution=resolution)
    images = model.input.random(0)
    assert images.shape == fed
    model.check(images)


def test_another_resolution_than_the_model_s_own_is_refused(tmp_path: Path) -> None:
    path = image_model(tmp_path / "model.onnx", ("batch", 3, 8, 8))
    assert AnyModel(path, resolution=8).input.shape == (1, 3, 8, 8)
    with pytest.raises(CheckpointError, match="takes sides of 8, not of 12"):
        AnyModel(path, resolution=12)


@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        (TensorProto.FLOAT, np.float32),
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.DOUBLE, np.float64),
        (TensorProto.UINT8, np.uint8),
        (TensorProto.INT8, np.int8),
    ],
)
def test_images_have_the_type_of_the_input_and_use_its_range(
    element: int, dtype: type[np.generic], tmp_path: Path
) -> None:
    model = AnyModel(image_model(tmp_path / "model.onnx", ("batch", 3, 64, 64), element))
    images = model.input.random(0)
    assert images.dtype == dtype
    model.check(images)
    if images.dtype.kind == "f":
        assert abs(images.astype(np.float64).std() - 1) < 0.05
    else:
        assert (images.min(), images.max()) == (np.iinfo(dtype).min, np.iinfo(dtype).max)


def test_the_seed_decides_the_images(tmp_path: Path) -> None:
    source = AnyModel(image_model(tmp_path / "model.onnx")).input
    assert np.array_equal(source.random(1), source.random(1))
    assert not np.array_equal(source.random(1), source.random(2))


def test_the_outputs_are_those_of_the_model(tmp_path: Path) -> None:
    model = AnyModel(image_model(tmp_path / "model.onnx", scale=3.0))
    images = model.input.random(0)
    (score,) = model.run(images)
    assert score.reshape(()) == pytest.approx(3 * images.mean(), rel=1e-4)


def test_every_session_has_the_same_options(tmp_path: Path) -> None:
    options = AnyModel(image_model(tmp_path / "model.onnx"), threads=2).session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.execution_mode.name == "ORT_SEQUENTIAL"
    assert options.graph_optimization_level.name == "ORT_ENABLE_ALL"
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


# What is refused.


def two_inputs(path: Path) -> None:
    shape = ["batch", 3, 8, 8]
    nodes = [helper.make_node("Add", ["left", "right"], ["score"])]
    save(path, nodes, [("left", TensorProto.FLOAT, shape), ("right", TensorProto.FLOAT, shape)])


def no_input(path: Path) -> None:
    save(path, [helper.make_node("Constant", [], ["score"], value_floats=[1.0])], [])


def strings(path: Path) -> None:
    table = helper.make_node("LabelEncoder", ["word"], ["score"], domain="ai.onnx.ml")
    table.attribute.append(helper.make_attribute("keys_strings", ["a"]))
    table.attribute.append(helper.make_attribute("values_floats", [1.0]))
    save(path, [table], [("word", TensorProto.STRING, ["batch", 3, 8, 8])])
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    onnx.save(model, path)


def truncated(path: Path) -> None:
    content = image_model(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def unknown_operator(path: Path) -> None:
    node = helper.make_node("Frobnicate", ["pixels"], ["score"])
    save(path, [node], [("pixels", TensorProto.FLOAT, ["batch", 3, 8, 8])])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda _: None, "no such file"),
    "directory": (Path.mkdir, "not a file"),
    "empty": (Path.touch, "not a model that onnxruntime can load"),
    "text": (lambda path: path.write_text("accuracy: 99\n"), "not a model that onnxruntime can load"),
    "truncated": (truncated, "not a model that onnxruntime can load"),
    "unknown operator": (unknown_operator, "Frobnicate"),
    "two inputs": (two_inputs, "need a model with one input, its inputs are: 'left', 'right'"),
    "no input": (no_input, "its inputs are: none"),
    "strings": (strings, r"'word' tensor\(string\) .*: not a type of images, allowed: tensor\(float\)"),
    "flat": (lambda path: image_model(path, ("batch", 192)), r"\['batch', 192\]: need a batch of images"),
    "no channels": (lambda path: image_model(path, (1, 64, 8, 8)), "neither the second nor the last"),
    "any channels": (lambda path: image_model(path, (1, "c", 8, 8)), "neither the second nor the last"),
    "other batch": (lambda path: image_model(path, (4, 3, 8, 8)), "takes batches of 4, not of 1"),
    "any size": (lambda path: image_model(path, (1, 3, "h", "w")), "takes images of any size: give a resol"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_measured_is_refused_naming_file_and_reason(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.onnx"
    make, reason = BAD[kind]
    make(path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        AnyModel(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    node = helper.make_node("Reshape", ["pixels", "shape"], ["score"])
    shape = helper.make_tensor("shape", TensorProto.INT64, [1], [7])
    save(path, [node], [("pixels", TensorProto.FLOAT, ["batch", 3, 8, 8])], [shape])
    model = AnyModel(path)
    with pytest.raises(CheckpointError, match=r"model\.onnx: onnxruntime can't run it: ") as caught:
        model.check(model.input.random(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_are_refused(scale: float, tmp_path: Path) -> None:
    model = AnyModel(image_model(tmp_path / "model.onnx", scale=scale))
    with pytest.raises(VerificationError, match=r"model\.onnx: output 'score' holds NaN or infinity"):
        model.check(model.input.random(0))
    assert issubclass(VerificationError, QatError)
