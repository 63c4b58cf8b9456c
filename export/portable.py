"""The portable target: an ONNX graph of standard operators that computes an :class:`IntegerNetwork`.

Signed 8-bit tensors are stored as uint8 with zero point 128, since onnxruntime's fast convolution reads
and writes uint8. Element-wise arithmetic stands between DequantizeLinear and QuantizeLinear with scale 1
or a dyadic multiplier: its float32 values are exact, and onnxruntime fuses the group into one integer
operator. Real-world scales are in the metadata (``grids``).

- Binary weights are stored 8 to a byte and looked up in a 256×8 table of ±1; runtimes fold that at load.
- A sign is uint8 128 or 0 with zero point 64, that is ±64, so the int32 bias resolves 1/64 of a product.
- Other weights are uint8 with zero point 128: uint8 × int8 with large weights overflows the 16-bit
  intermediate of processors without VNNI.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from export.graph import FLOAT, INT32, GraphBuilder, tensor_info
from export.integer import (
    ALWAYS,
    NEVER,
    Affine,
    Attention,
    BinaryConv,
    Grid,
    IntegerNetwork,
    Slopes,
    SubBlock,
)
from qat import __version__
from qat.dyadic import ACCUMULATOR_UNIT

OPSET = 13
INPUT, OUTPUT = "image", "logits"
#: uint8 that stands for 0 in a signed tensor.
ZERO = 128
Array = NDArray[Any]


def emit(network: IntegerNetwork, image_size: int | None = None) -> onnx.ModelProto:
    """The ONNX model of ``network``: float32 normalized images (batch, 3, S, S) → float32 logits.

    Args:
        network: the lowered network.
        image_size: side ``S``; the size it was trained on by default.
    """
    size = image_size or network.image_size
    emitter = _Emitter(network, size)
    return emitter.builder.model(
        "bnext",
        [tensor_info(INPUT, FLOAT, ["batch", 3, size, size])],
        [tensor_info(OUTPUT, FLOAT, ["batch", len(network.class_names)])],
        opset=OPSET,
        metadata=_metadata(network, size),
        description=f"{network}\n"
        f"int8 tensors are uint8 with zero point {ZERO}; metadata 'grids' has the scales.",
        producer_version=__version__,
    )


def _metadata(network: IntegerNetwork, size: int) -> dict[str, str]:
    grids = {
        name: {"scale": grid.scale, "bits": grid.bits, "signed": grid.signed, "zero_point": grid.zero_point}
        for name, grid in network.grids.items()
    }
    return network.metadata | {
        "format": "bnext-qat portable 1",
        "architecture": network.architecture,
        "class_names": json.dumps(network.class_names),
        "normalization": json.dumps({"mean": network.mean, "std": network.std}),
        "image_size": str(size),
        "grids": json.dumps(grids, sort_keys=True),
    }


class _Emitter:
    """Walks the network once, in forward order."""

    def __init__(self, network: IntegerNetwork, size: int) -> None:
        self.builder = GraphBuilder()
        self.one = self.builder.constant(np.float32(1))
        self.zero = self.builder.constant(np.uint8(ZERO))
        stem = network.stem
        image = self.builder.node(
            "QuantizeLinear",
            [
                INPUT,
                self.builder.constant(np.float32(stem.image.scale), "image_scale"),
                self.builder.constant(np.uint8(stem.image.zero_point), "image_zero_point"),
            ],
            "image/uint8",
        )
        x = self.affine_conv(
            image,
            stem.conv,
            "feature.0/trunk",
            network.stem_grid,
            stem.image.zero_point,
            stride=stem.stride,
            pad=1,
        )
        side = -(-size // stem.stride)
        for block in network.blocks:
            x = self.sub_block(
                block.spatial, x, block.input_grid, block.middle_grid, side, f"{block.name}/trunk_mid"
            )
            side = -(-side // block.spatial.conv.stride)
            name = f"{block.name}/trunk_out"
            if len(block.pointwise) == 1:
                x = self.sub_block(block.pointwise[0], x, block.middle_grid, block.output_grid, side, name)
            else:
                parts = [
                    self.sub_block(sub, x, block.middle_grid, block.output_grid, side, f"{sub.name}/out")
                    for sub in block.pointwise
                ]
                x = self.builder.node("Concat", parts, name, axis=1)
        self.head(network, x, side)

    # Element-wise arithmetic between DequantizeLinear and QuantizeLinear.

    def real(self, x: str, multiplier: np.float32 | float, output: str) -> str:
        """``multiplier * (x - 128)`` in float32, for a consumer of its own (fusion wants one each)."""
        scale = self.builder.constant(np.float32(multiplier))
        return self.builder.node("DequantizeLinear", [x, scale, self.zero], output)

    def integer(self, x: str, grid: Grid, output: str) -> str:
        """Round half to even and saturate to ``grid``, stored as uint8."""
        zero = self.zero if grid.signed else self.builder.constant(np.uint8(0))
        if grid.bits == 8:
            return self.builder.node("QuantizeLinear", [x, self.one, zero], output)
        return self.clip(
            self.builder.node("QuantizeLinear", [x, self.one, zero], f"{output}.wide"), grid, output
        )

    def clip(self, x: str, grid: Grid, output: str) -> str:
        """Saturate 8-bit integers to fewer bits."""
        shift = ZERO if grid.signed else 0
        bounds = [self.builder.constant(np.uint8(bound + shift)) for bound in (grid.low, grid.high)]
        return self.builder.node("Clip", [x, *bounds], output)

    def binary(
        self,
        operator: str,
        a: tuple[str, np.float32 | float],
        b: tuple[str, np.float32 | float],
        grid: Grid,
        output: str,
    ) -> str:
        """``saturate((a * multiplier) operator (b * multiplier))``."""
        left = self.real(a[0], a[1], f"{output}.left")
        right = self.real(b[0], b[1], f"{output}.right")
        return self.integer(self.builder.node(operator, [left, right], f"{output}.real"), grid, output)

    def prelu(self, x: str, slopes: Slopes, grid: Grid, output: str) -> str:
        """``max(x, x * slope)`` where no slope exceeds 1, else a selection by the sign of ``x``."""
        shape = (1, -1, 1, 1)
        stored = (slopes.integers.astype(np.int16) + ZERO).astype(np.uint8).reshape(shape)
        constant = self.builder.constant(stored, f"{output}.slopes")
        scale = np.ldexp(1.0, -slopes.shift)
        scaled = self.binary("Mul", (x, 1.0), (constant, scale), grid, f"{output}.scaled")
        if float(slopes.integers.max()) * scale <= 1.0:
            return self.builder.node("Max", [x, scaled], output)
        negative = self.builder.node("Less", [x, self.zero], f"{output}.negative")
        return self.builder.node("Where", [negative, scaled, x], output)

    # Convolutions.

    def affine_conv(
        self, x: str, layer: Affine, output: str, grid: Grid, x_zero: int, *, stride: int = 1, pad: int = 0
    ) -> str:
        """Convolution with integer weights of several bits; 2-D weights are 1×1 kernels."""
        weight = layer.weight if layer.weight.ndim == 4 else layer.weight[:, :, None, None]
        stored = self.builder.constant((weight.astype(np.int16) + ZERO).astype(np.uint8), f"{output}.weight")
        return self.qlinear_conv(
            x,
            x_zero,
            stored,
            np.full(len(weight), ZERO, np.uint8),
            layer.multiplier,
            layer.bias,
            grid,
            output,
            stride,
            pad,
        )

    def qlinear_conv(
        self,
        x: str,
        x_zero: int,
        weight: str,
        weight_zero: Array,
        multiplier: Array,
        bias: Array,
        grid: Grid,
        output: str,
        stride: int,
        pad: int,
    ) -> str:
        """``saturate(float32(conv + bias) * multiplier)``: scales of input and output are 1."""
        target = output if grid.bits == 8 else f"{output}.wide"
        self.builder.node(
            "QLinearConv",
            [
                x,
                self.one,
                self.builder.constant(np.uint8(x_zero)),
                weight,
                self.builder.constant(multiplier, f"{output}.multiplier"),
                self.builder.constant(weight_zero),
                self.one,
                self.zero if grid.signed else self.builder.constant(np.uint8(0)),
                self.builder.constant(bias, f"{output}.bias"),
            ],
            target,
            strides=[stride, stride],
            pads=[pad] * 4,
        )
        return target if grid.bits == 8 else self.clip(target, grid, output)

    def binary_conv(self, x: str, conv: BinaryConv, grid: Grid, output: str) -> str:
        """Threshold, then convolution with ±1 weights unpacked from their bits."""
        name = output.removesuffix("/conv")
        sign = self.builder.node(
            "Where",
            [
                self.positive(x, conv, f"{name}/positive"),
                self.builder.constant(np.uint8(2 * ACCUMULATOR_UNIT)),
                self.builder.constant(np.uint8(0)),
            ],
            f"{name}/sign",
        )
        weight = self.unpacked(conv, f"{name}/binary_weight")
        pad = conv.kernel_size // 2
        zero = np.zeros(conv.channels, np.int8)
        return self.qlinear_conv(
            sign, ACCUMULATOR_UNIT, weight, zero, conv.multiplier, conv.bias, grid, output, conv.stride, pad
        )

    def positive(self, x: str, conv: BinaryConv, output: str) -> str:
        """Boolean ``x >= threshold``. ``x > threshold - 1`` can't say "always" in uint8: a mask does."""
        always = conv.threshold <= ALWAYS
        assert int(conv.threshold.max()) <= NEVER
        below = (np.where(always, 0, conv.threshold.astype(np.int32) - 1 + ZERO)).astype(np.uint8)
        bound = self.builder.constant(below.reshape(1, -1, 1, 1), f"{output}.bound")
        if not always.any():
            return self.builder.node("Greater", [x, bound], output)
        mask = self.builder.constant(always.reshape(1, -1, 1, 1), f"{output}.always")
        return self.builder.node(
            "Or", [self.builder.node("Greater", [x, bound], f"{output}.above"), mask], output
        )

    def unpacked(self, conv: BinaryConv, output: str) -> str:
        """±1 int8 weights from their bits."""
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
        table = self.builder.constant((2 * bits.astype(np.int8) - 1).astype(np.int8))
        stored = self.builder.constant(conv.sign_bits, f"{output}.bits")
        index = self.builder.node("Cast", [stored], f"{output}.index", to=INT32)
        flat = self.builder.node("Gather", [table, index], f"{output}.rows", axis=0)
        count = int(np.prod(conv.shape))
        if count % 8:  # the last byte is not full
            line = self.builder.node(
                "Reshape", [flat, self.builder.constant(np.array([-1]))], f"{output}.line"
            )
            ends = [self.builder.constant(np.array([edge])) for edge in (0, count)]
            flat = self.builder.node("Slice", [line, *ends], f"{output}.used")
        return self.builder.node("Reshape", [flat, self.builder.constant(np.array(conv.shape))], output)

    # Means and attention.

    def sums(self, x: str, channels: int, pixels: int, multiplier: Array, output: str) -> str:
        """Exact sums over the image times ``multiplier / pixels``: (N, C, 1) float32."""
        shape = self.builder.constant(np.array([0, channels, pixels]))
        rows = self.builder.node("Reshape", [x, shape], f"{output}.rows")
        ones = self.builder.constant(np.ones((pixels, 1), np.int8))
        total = self.builder.node("MatMulInteger", [rows, ones, self.zero], f"{output}.sum")
        real = self.builder.node("Cast", [total], f"{output}.sum_real", to=FLOAT)
        factor = (multiplier / np.float32(pixels)).astype(np.float32)
        return self.builder.node(
            "Mul", [real, self.builder.constant(factor.reshape(-1, 1), f"{output}.multiplier")], output
        )

    def attention(self, attention: Attention, x: str, y: str, in_side: int, out_side: int, name: str) -> str:
        """Gain vector (N, C, 1, 1), uint8 with zero point 128."""
        channels = len(attention.gain)
        if in_side != out_side and in_side % 2:
            x, in_side = self.pad_to_even(x, f"{name}/even"), in_side + 1
        mix = self.builder.node(
            "Add",
            [
                self.sums(x, channels, in_side**2, attention.input_mean, f"{name}/input_mean"),
                self.sums(y, channels, out_side**2, attention.y_mean, f"{name}/y_mean"),
            ],
            f"{name}/mix",
        )
        pooled = self.integer(mix, attention.pooled, f"{name}/pooled")
        shape = self.builder.constant(np.array([0, channels, 1, 1]))
        pooled = self.builder.node("Reshape", [pooled, shape], f"{name}/pooled_4d")
        hidden = self.affine_conv(pooled, attention.reduce, f"{name}/hidden", attention.hidden, ZERO)
        logits = self.affine_conv(hidden, attention.expand, f"{name}/logits", attention.logits, 0)
        index = self.builder.node("Cast", [logits], f"{name}/logits_index", to=INT32)
        table = self.builder.constant(attention.table, f"{name}/sigmoid_table")
        share = self.builder.node("Gather", [table, index], f"{name}/attention", axis=0)
        real = self.builder.node("Cast", [share], f"{name}/attention_real", to=FLOAT)
        factor = self.builder.constant(attention.gain.reshape(1, -1, 1, 1), f"{name}/gain.multiplier")
        gain = self.builder.node("Mul", [real, factor], f"{name}/gain.real")
        return self.integer(gain, Grid(1.0, 8, signed=True), f"{name}/gain")

    def pad_to_even(self, x: str, output: str) -> str:
        """Replicate the last row and column (sides are odd)."""
        pads = self.builder.constant(np.array([0, 0, 0, 0, 0, 0, 1, 1]))
        return self.builder.node("Pad", [x, pads], output, mode="edge")

    # Sub-blocks and head.

    def sub_block(
        self, sub: SubBlock, x: str, source: Grid, output: Grid, side: int, output_name: str
    ) -> str:
        """One sub-block; see :class:`export.reference.Interpreter`."""
        name, builder = sub.name, self.builder
        q = self.binary_conv(x, sub.conv, sub.y_grid, f"{name}/conv")
        y = self.prelu(q, sub.slopes, sub.y_grid, f"{name}/y")
        residual, out_side = x, side
        if sub.residual_slopes is not None:
            residual = self.prelu(x, sub.residual_slopes, source, f"{name}/prelu1")
        if sub.conv.stride == 2:
            out_side = -(-side // 2)
            even = self.pad_to_even(residual, f"{name}/residual.even") if side % 2 else residual
            real = self.real(even, 1.0, f"{name}/residual.left")
            mean = builder.node(
                "AveragePool", [real], f"{name}/residual.real", kernel_shape=[2, 2], strides=[2, 2]
            )
            residual = self.integer(mean, source, f"{name}/residual")
        branch = y
        if sub.branch is not None:
            if sub.attention is not None:
                gain = self.attention(sub.attention, x, y, side, out_side, name)
            else:
                assert sub.branch.gain is not None
                stored = (sub.branch.gain.astype(np.int16) + ZERO).astype(np.uint8).reshape(1, -1, 1, 1)
                gain = builder.constant(stored, f"{name}/gain")
            factors = (y, sub.branch.first.value), (gain, 1.0)
            if sub.branch.product is not None and sub.branch.second is not None:
                branch = self.binary("Mul", *factors, sub.branch.product, f"{name}/product")
                factors = (branch, sub.branch.second.value), (residual, 1.0)
            branch = self.binary("Mul", *factors, sub.branch.grid, f"{name}/branch")
            offset = (sub.branch.offset.astype(np.int16) + ZERO).astype(np.uint8).reshape(1, -1, 1, 1)
            constant = builder.constant(offset, f"{name}/offset")
            branch = self.binary("Add", (branch, 1.0), (constant, 1.0), sub.branch.grid, f"{name}/normalized")
        terms = (branch, sub.branch_multiplier.value), (residual, sub.residual_multiplier.value)
        return self.binary("Add", *terms, output, output_name)

    def head(self, network: IntegerNetwork, x: str, side: int) -> None:
        """PReLU, mean, classifier."""
        head, builder = network.head, self.builder
        layer = head.classifier
        channels = layer.weight.shape[1]
        x = self.prelu(x, head.slopes, network.blocks[-1].output_grid, "head/prelu")
        mean = self.sums(x, channels, side**2, np.full(channels, head.mean, np.float32), "head/mean")
        pooled = self.integer(mean, head.input, "head/input")
        flat = builder.node("Reshape", [pooled, builder.constant(np.array([0, channels]))], "head/flat")
        weight = builder.constant((layer.weight.T.astype(np.int16) + ZERO).astype(np.uint8), "fc.weight")
        total = builder.node("MatMulInteger", [flat, weight, self.zero, self.zero], "fc/products")
        biased = builder.node("Add", [total, builder.constant(layer.bias, "fc.bias")], "fc/total")
        real = builder.node("Cast", [biased], "fc/real", to=FLOAT)
        builder.node("Mul", [real, builder.constant(layer.multiplier, "fc.multiplier")], OUTPUT)
