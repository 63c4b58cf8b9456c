"""onnxruntime's fused integer operators are exact for every multiplier that lowering can choose.

Every pair of 8-bit integers goes through the graph that the portable target emits for one product or one sum,
and must come out as exact arithmetic has it. That is what limits the bits and shifts in
`qat.quantize.dyadic`.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from qat_export.graphs.builder import GraphBuilder, tensor_info

from qat.quantize.dyadic import LARGEST_SHIFT, PRODUCT_BITS, dyadic, sum_multipliers

Array = NDArray[np.uint8]
PAIRS = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij")).reshape(2, 1, 1, 256, 256)


def run(operator: str, left: float, right: float) -> tuple[NDArray[np.int64], set[str]]:
    """Result of one element-wise group on all pairs, and the operators it became at load."""
    builder = GraphBuilder()
    zero, one = builder.constant(np.uint8(128)), builder.constant(np.float32(1))
    a = builder.node("DequantizeLinear", ["a", builder.constant(np.float32(left)), zero], "left")
    b = builder.node("DequantizeLinear", ["b", builder.constant(np.float32(right)), zero], "right")
    builder.node("QuantizeLinear", [builder.node(operator, [a, b], "real"), one, zero], "out")
    element = onnx.TensorProto.UINT8
    infos = [tensor_info(name, element, [1, 1, 256, 256]) for name in ("a", "b", "out")]
    model = builder.model(
        "pairs", infos[:2], infos[2:], opset=13, metadata={}, description="", producer_version="0"
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = {"a": PAIRS[0].astype(np.uint8), "b": PAIRS[1].astype(np.uint8)}
    return session.run(None, inputs)[0].astype(np.int64) - 128, {node.op_type for node in model.graph.node}


def rounded(numerator: NDArray[np.int64], shift: int) -> NDArray[np.int64]:
    """``numerator / 2**shift``, half to even, in int8; by integers alone."""
    if shift <= 0:
        return np.clip(numerator * 2**-shift, -128, 127)
    floor, rest = numerator >> shift, numerator & (2**shift - 1)
    half = 2 ** (shift - 1)
    up = (rest > half) | ((rest == half) & (floor % 2 == 1))
    return np.clip(floor + up, -128, 127)


@pytest.mark.parametrize("exponent", range(-18, 3))
def test_products_are_exact_for_every_multiplier(exponent: int) -> None:
    a, b = (PAIRS - 128).astype(np.int64)
    for mantissa in np.random.default_rng(exponent + 100).uniform(1.0, 2.0, 12):
        multiplier = dyadic(float(np.ldexp(mantissa, exponent)), PRODUCT_BITS)
        assert multiplier.shift <= LARGEST_SHIFT
        found, operators = run("Mul", multiplier.value, 1.0)
        assert "Mul" in operators
        np.testing.assert_array_equal(found, rounded(a * b * multiplier.integer, multiplier.shift))


@pytest.mark.parametrize("exponent", range(-18, 3))
def test_sums_are_exact_for_every_pair_of_multipliers(exponent: int) -> None:
    a, b = (PAIRS - 128).astype(np.int64)
    for larger, ratio in np.random.default_rng(exponent + 100).uniform((1.0, 0.0), (2.0, 1.0), (12, 2)):
        value = float(np.ldexp(larger, exponent))
        both = sum_multipliers(value * float(ratio), value)
        assert both.branch.shift == both.residual.shift <= LARGEST_SHIFT
        found, _ = run("Add", both.branch.value, both.residual.value)
        total = a * both.branch.integer + b * both.residual.integer
        np.testing.assert_array_equal(found, rounded(total, both.branch.shift))


def test_a_larger_shift_would_not_be_exact() -> None:
    """Why the shift is limited: the sanity of the two tests above."""
    a, b = (PAIRS - 128).astype(np.int64)
    wrong = 0
    for integer in range(513, 1024, 30):
        found, _ = run("Mul", float(np.ldexp(integer, -19)), 1.0)
        wrong += int((found != rounded(a * b * integer, 19)).any())
    assert wrong
