"""Loading exported models, and comparing them with the network they came from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import MEAN, STD, lowered, ordinary, pixels, quantization, run_tensors, toy

from export.portable import emit
from export.verify import LOGIT_DIFFERENCE, TOP1_AGREEMENT, Comparison, OnnxModel, compare
from qat.data import MemorySplit
from qat.errors import CheckpointError, DataError, VerificationError
from qat.evaluate import predictor
from qat.recipe import Data

DATA = Data(image_size=16, mean=MEAN, std=STD, eval_batch_size=16)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(ordinary()[2], tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def split() -> MemorySplit:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 1, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear").mul(255).to(torch.uint8)
    return MemorySplit([str(i) for i in range(10)], images, torch.arange(40) % 10)


# Loading.


def test_a_loaded_model_runs_and_knows_its_size(path: Path) -> None:
    model = OnnxModel(path)
    assert (model.image_size, model.num_classes) == (16, 10)
    assert model.metadata["run"] == "a test"
    images = pixels(0, 3, 16)
    logits = model(images)
    assert (logits.shape, logits.dtype) == ((3, 10), torch.float32)
    as_written, _ = run_tensors(onnx.load(path), {}, images.numpy(), optimize=False)
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


# Comparing.


def test_a_fresh_export_equals_the_torch_network_and_the_reference_in_every_logit(
    path: Path, split: MemorySplit
) -> None:
    model, network, _ = ordinary()
    result = compare(predictor(model), OnnxModel(path), network, split, DATA)
    assert (result.n, result.reference_n) == (40, 32)
    assert result.reference_equal == 100.0
    assert (result.agreement, result.largest, result.rms, result.relative) == (100.0, 0.0, 0.0, 0.0)
    assert result.network_top1 == result.model_top1
    result.require()
    assert len(result.rows()) == 8


@pytest.mark.parametrize("options", [{"elm_attention": False}, {"infor_recoupling": False}], ids=str)
@pytest.mark.parametrize("trunk", [3, 8])
def test_an_ablated_export_passes_its_verification(
    options: dict[str, bool], trunk: int, tmp_path: Path, split: MemorySplit
) -> None:
    model = toy(4, quantization(trunk=trunk, se=trunk), **options)
    network = lowered(model)
    exported = OnnxModel(saved(emit(network), tmp_path / "model.onnx"))
    result = compare(predictor(model), exported, network, split, DATA)
    assert (result.largest, result.reference_equal) == (0.0, 100.0)
    result.require()


def test_a_model_compared_with_itself_passes(path: Path, split: MemorySplit) -> None:
    model = OnnxModel(path)
    result = compare(model, model, ordinary()[1], split, DATA)
    assert (result.agreement, result.rms, result.largest, result.relative) == (100.0, 0.0, 0.0, 0.0)
    result.require()


def damaged(kind: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(ordinary()[2])
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    if kind == "sign bits":
        tensor = tensors["feature.3.FFN_1/binary_weight.bits"]
        tensor.raw_data = bytes([tensor.raw_data[0] ^ 0xFF]) + tensor.raw_data[1:]
    else:
        name = {"requantization": "feature.1.FFN_1/conv.multiplier", "logit": "fc.multiplier"}[kind]
        values = onnx.numpy_helper.to_array(tensors[name]).copy()
        values[0] *= np.float32(1.01)
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    return model


@pytest.mark.parametrize("kind", ["sign bits", "requantization", "logit"])
def test_one_wrong_constant_in_the_file_fails_the_verification(
    kind: str, tmp_path: Path, split: MemorySplit
) -> None:
    _, network, model = ordinary()
    good = OnnxModel(saved(model, tmp_path / "good.onnx"))
    bad = OnnxModel(saved(damaged(kind), tmp_path / "bad.onnx"))
    result = compare(good, bad, network, split, DATA)
    assert result.reference_equal < 100.0
    with pytest.raises(VerificationError, match="of the logits equal the integer reference"):
        result.require()


def test_a_model_of_another_network_fails_on_every_bound(tmp_path: Path, split: MemorySplit) -> None:
    other = OnnxModel(saved(emit(lowered(toy(50))), tmp_path / "other.onnx"))
    torch_model, network, _ = ordinary()
    result = compare(predictor(torch_model), other, network, split, DATA)
    with pytest.raises(VerificationError) as caught:
        result.require()
    assert all(part in str(caught.value) for part in ("top-1 agrees", "logits differ", "integer reference"))


GOOD = Comparison(1000, 90.0, 90.0, TOP1_AGREEMENT, 0.1, 0.1, LOGIT_DIFFERENCE, 32, 100.0)


def test_the_bounds_themselves_pass() -> None:
    GOOD.require()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agreement": 99.89}, "top-1 agrees on 99.89%"),
        ({"agreement": float("nan")}, "top-1 agrees"),
        ({"relative": 1.01e-3}, "logits differ by 0.101% RMS"),
        ({"relative": float("nan")}, "logits differ"),
        ({"reference_equal": 99.99}, "only 99.99%"),
        ({"reference_equal": float("nan")}, "of the logits equal"),
    ],
)
def test_each_bound_is_enforced_and_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        replace(GOOD, **change).require()
