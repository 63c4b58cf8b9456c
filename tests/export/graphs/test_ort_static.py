"""The baseline by onnxruntime's ``quantize_static``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from qat_export.bench.any_model import AnyModel
from qat_export.graphs.float32 import emit_float
from qat_export.graphs.ort_static import FORMAT, OPERATORS, quantize_static
from qat_export.verify.model import OnnxModel, require_integers

from qat.errors import CheckpointError, OutputError, QuantizationError
from tests.helpers.networks import MEAN, STD, float_network, pixels

SIZE = 32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "float32.onnx"
    model = float_network(size=SIZE)
    path.write_bytes(emit_float(model, image_size=SIZE, mean=MEAN, std=STD).SerializeToString())
    return path


@pytest.fixture(scope="module")
def static(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its result; nothing may be shown and nothing left beside the source, whether sympy is there or not."""
    folder = tmp_path_factory.mktemp("static")
    (folder / "sympy.py").write_text("raise ImportError('not installed')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        quantize_static(source, folder / "static.onnx", pixels(1, 3, SIZE).numpy())
    return folder / "static.onnx"


def test_convolutions_and_products_alone_are_quantized(static: Path) -> None:
    graph = onnx.load(static).graph
    makers = {output: node for node in graph.node for output in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type in OPERATORS:
            read = [makers[name].op_type for name in node.input]
            assert read[:2] == ["DequantizeLinear"] * 2, node.name
        elif node.op_type == "QuantizeLinear":
            # What an operator makes or reads, and nothing else.
            ends = [makers.get(node.input[0]), readers.get(readers[node.output[0]].output[0])]
            assert {end.op_type for end in ends if end is not None} & set(OPERATORS), node.name
    assert sum(node.op_type == "Conv" for node in graph.node) == 1 + 3 * 8


def test_weights_are_int8_per_output_channel(static: Path) -> None:
    graph = onnx.load(static).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    for node in convolutions:
        stored, scale, _ = (values[name] for name in makers[node.input[1]].input)
        assert stored.dtype == np.int8
        assert scale.shape == (len(stored),)
    signs = values[makers[convolutions[1].input[1]].input[0]]
    assert set(np.unique(signs)) == {-64, 64}  # of 7 bits: see export/qat_export/graphs/ort_static.py


def test_activations_are_uint8(static: Path) -> None:
    graph = onnx.load(static).graph
    zeros = {tensor.name: tensor.data_type for tensor in graph.initializer}
    found = {zeros[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert found == {onnx.TensorProto.UINT8}


def test_it_computes_roughly_what_the_float_model_does(source: Path, static: Path) -> None:
    images = pixels(9, 8, SIZE).numpy()
    both = [AnyModel(path, batch=8).run(images)[0].ravel() for path in (source, static)]
    assert not np.array_equal(*both)
    assert np.corrcoef(both)[0, 1] > 0.9


def test_the_file_says_what_it_is(source: Path, static: Path) -> None:
    ours, theirs = OnnxModel(static).metadata, OnnxModel(source).metadata
    assert ours["format"] == FORMAT
    assert ours["normalization"] == theirs["normalization"]
    with pytest.raises(CheckpointError, match="a float export"):
        require_integers(ours, static)


def test_nothing_is_shown_and_nothing_left_behind(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    quantize_static(source, tmp_path / "static.onnx", pixels(1, 1, SIZE).numpy())
    assert capfd.readouterr() == ("", "")
    assert list(source.parent.iterdir()) == [source]
    # onnxruntime itself keeps an identifier of its session there.
    assert {path.name for path in (tmp_path / "scratch").iterdir()} <= {".ses"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "static.onnx"]


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(QuantizationError, match=r"text\.onnx: onnxruntime's quantize_static failed: "):
        quantize_static(tmp_path / "text.onnx", tmp_path / "static.onnx", pixels(1, 1, SIZE).numpy())
    assert not (tmp_path / "static.onnx").exists()


def test_a_target_that_cannot_be_written_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a folder"):
        quantize_static(source, tmp_path, pixels(1, 1, SIZE).numpy())
