"""The portable target in operators that every runtime reads alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from qat_export.graphs.builder import OPSET, GraphBuilder
from qat_export.graphs.portable import emit_portable
from qat_export.graphs.strict_operators import StrictOperators
from qat_export.integer.network import Affine, IntegerNetwork
from qat_export.integer.reference import Interpreter

from qat.errors import QuantizationError
from qat.grid import Grid
from tests.helpers.cases import exhaustive, slow
from tests.helpers.networks import (
    float_network,
    lowered,
    make_extreme,
    ordinary,
    parity_problems,
    pixels,
    prepared,
    quantization,
    toy,
)


def extreme(seed: int) -> IntegerNetwork:
    model = float_network(seed)
    make_extreme(model, seed)
    return lowered(prepared(model, seed=seed))


def test_it_has_no_quantized_operator_over_images() -> None:
    model = emit_portable(ordinary()[1], strict=True)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    operators = {node.op_type for node in model.graph.node}
    assert operators.isdisjoint({"QLinearConv", "QuantizeLinear", "ConvInteger"})
    assert [n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"] == ["logits"]


@pytest.mark.parametrize(
    ("bits", "size"), [((8, 8), 16), slow((4, 3), 9), exhaustive((8, 8), 9), exhaustive((4, 3), 16)]
)
def test_it_equals_the_interpreter_in_onnxruntime(size: int, bits: tuple[int, int]) -> None:
    network = lowered(toy(2, quantization(trunk=bits[0], se=bits[1], stem_weight=bits[0])))
    model = emit_portable(network, size, strict=True)
    assert list(parity_problems(network, model, pixels(1, 3, size).numpy())) == []


@pytest.mark.parametrize("seed", [0, slow(1), exhaustive(2), exhaustive(3)])
def test_extreme_parameters_keep_the_parity(seed: int) -> None:
    network = extreme(seed)
    model = emit_portable(network, strict=True)
    assert list(parity_problems(network, model, pixels(seed, 2, 16).numpy())) == []


def test_binary_weights_take_one_bit_in_the_file_here_too() -> None:
    network = lowered(toy(8, widths=(64, 128), size=8), size=8)
    fast, strict = (len(emit_portable(network, strict=s).SerializeToString()) for s in (False, True))
    assert strict < fast + 40_000


def test_sums_that_float32_cannot_hold_are_refused() -> None:
    network = ordinary()[1]
    emit_portable(network, 362, strict=True)
    with pytest.raises(QuantizationError, match="input_mean: sums up to 16,866,432"):
        emit_portable(network, 363, strict=True)
    fc_like = np.full((2, 2000, 1, 1), 127, np.int8)
    layer = Affine(fc_like, np.zeros(2, np.int32), np.ones(2, np.float32))
    signed = Grid(1.0, 8, signed=True)
    with pytest.raises(QuantizationError, match="hidden: sums up to 32,512,000"):
        StrictOperators(GraphBuilder()).affine_conv("x", layer, signed, signed, "hidden")


def in_openvino(model: onnx.ModelProto, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    core = openvino.Core()
    # Without the hint, processors with bfloat16 compute in it.
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return np.asarray(compiled(images)[0])


@pytest.mark.parametrize(
    ("kind", "seed"),
    [("ordinary", 0), ("extreme", 0), slow("extreme", 1)]
    + [exhaustive(*case) for case in (("ordinary", 1), ("ordinary", 2), ("extreme", 2))],
)
def test_openvino_computes_the_interpreter_s_logits_bit_for_bit(kind: str, seed: int) -> None:
    network = ordinary(seed)[1] if kind == "ordinary" else extreme(seed)
    images = pixels(seed, 4, 16).numpy()
    logits = in_openvino(emit_portable(network, strict=True), images)
    np.testing.assert_array_equal(logits, Interpreter(network)(images))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_openvino_reads_raw_pixels_alike(layout: str) -> None:
    network = ordinary()[1]
    raw = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16)).astype(np.uint8)
    fed = raw if layout == "NCHW" else np.ascontiguousarray(raw.transpose(0, 2, 3, 1))
    model = emit_portable(network, input_kind="uint8 NCHW" if layout == "NCHW" else "uint8 NHWC", strict=True)
    mean, std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (network.mean, network.std))
    expected = Interpreter(network)((raw.astype(np.float32) / np.float32(255) - mean) / std)
    np.testing.assert_array_equal(in_openvino(model, fed), expected)
