"""Single operations of the portable target against the specification, over all their inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from qat_export.graphs.builder import GraphBuilder, tensor_info
from qat_export.graphs.operators import IntegerOperators
from qat_export.integer.network import ALWAYS, NEVER, BinaryConv, Slopes
from qat_export.integer.reference import pool2x2, prelu, signs

from qat.grid import Grid

Array = np.ndarray[Any, Any]
INT8 = Grid(1.0, 8, signed=True)
EVERY = np.arange(-128, 128)


def run(builder: GraphBuilder, x: Array, optimize: bool) -> Array:
    """The graph's tensor "out" for signed integers ``x``, as signed integers."""
    element, shape = onnx.TensorProto.UINT8, list(x.shape)
    out = tensor_info("out", element, ["n", "c", "h", "w"])
    model = builder.model(
        "test", [tensor_info("x", element, shape)], [out], opset=13, metadata={}, description="",
        producer_version="0",
    )  # fmt: skip
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": (x + 128).astype(np.uint8)})[0]
    return np.asarray(found).astype(np.int16) - 128


def thresholded(threshold: Array) -> BinaryConv:
    channels = len(threshold)
    return BinaryConv(
        threshold=threshold.astype(np.int16),
        sign_bits=np.zeros(-(-channels * channels // 8), np.uint8),
        kernel_size=1,
        stride=1,
        bias=np.zeros(channels, np.int32),
        multiplier=np.ones(channels, np.float32),
    )


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(("low", "high"), [(ALWAYS + 1, NEVER), (ALWAYS, NEVER)])
@pytest.mark.parametrize("width", [1, 256])
def test_every_integer_meets_every_threshold(low: int, high: int, width: int, optimize: bool) -> None:
    conv = thresholded(np.arange(low, high + 1))
    x = np.broadcast_to(EVERY, (1, conv.channels, 256)).astype(np.int16)
    x = x.reshape(1, conv.channels, 256 // width, width)
    builder = GraphBuilder()
    IntegerOperators(builder).sign("x", conv, width, "out")
    np.testing.assert_array_equal(run(builder, x, optimize), 64 * signs(x, conv))


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("largest", [64, 65])  # a slope of 1, and one just above: two forms
def test_every_integer_meets_every_slope(largest: int, optimize: bool) -> None:
    slopes = Slopes(np.arange(-128, largest + 1).astype(np.int8), 6)
    x = np.broadcast_to(EVERY, (1, len(slopes.integers), 1, 256)).astype(np.int16)
    builder = GraphBuilder()
    IntegerOperators(builder).prelu("x", slopes, INT8, 256, "out")
    np.testing.assert_array_equal(run(builder, x, optimize), prelu(x, slopes, INT8))


@pytest.mark.parametrize("optimize", [False, True])
def test_the_mean_of_2x2_rounds_every_sum_half_to_even(optimize: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (1, 3, 200, 200)).astype(np.int16)
    x[0, 0] = np.resize(np.repeat(EVERY, 2), (200, 200))
    builder = GraphBuilder()
    IntegerOperators(builder).pool2x2("x", 3, "out")
    expected = pool2x2(x, INT8)
    assert len(np.unique(x.reshape(1, 3, 100, 2, 100, 2).sum((3, 5)))) > 500
    np.testing.assert_array_equal(run(builder, x, optimize), expected)
