"""Integer operations of the portable target, written in standard ONNX operators.

Signed 8-bit tensors are stored as uint8 with zero point 128, since onnxruntime's fast convolution reads
and writes uint8. Element-wise arithmetic stands between DequantizeLinear and QuantizeLinear with scale 1
or a dyadic multiplier: its float32 values are exact, and onnxruntime fuses the group into one integer
operator.

onnxruntime computes convolutions with channels last and keeps that order in between. Two forms here follow
from it (measurements: docs/performance.md): vectors of few channels are repeated along the width, so that
one broadcast runs over a row instead of over one pixel, and sums over the image are taken with channels last.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qat.grid import Grid
from qat.quantize.dyadic import ACCUMULATOR_UNIT
from qat_export.graphs.builder import INT32, GraphBuilder
from qat_export.graphs.metadata import INPUT
from qat_export.integer.network import ALWAYS, NEVER, Affine, BinaryConv, Slopes

#: uint8 that stands for 0 in a signed tensor.
ZERO: Final = 128
#: Vectors of at most so many channels are repeated along the width.
REPEATED_CHANNELS: Final = 256
#: Axis orders between channels first and channels last.
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
Array = NDArray[Any]
Factor = float | np.float32


class IntegerOperators:
    """Appends operations to a graph. Arguments and results are names of tensors; results are ``output``.

    Activations are (N, C, H, W), vectors of an image (N, 1, 1, C).
    """

    def __init__(self, builder: GraphBuilder) -> None:
        """Append to ``builder``."""
        self.builder = builder
        self.one = builder.constant(np.float32(1))
        self.zero = builder.constant(np.uint8(ZERO))

    # Storage.

    def real(self, x: str, multiplier: Factor, output: str) -> str:
        """The integers of ``x`` times ``multiplier`` in float32, for one consumer (fusion wants one each)."""
        scale = self.builder.constant(np.float32(multiplier))
        return self.builder.node("DequantizeLinear", [x, scale, self.zero], output)

    def integer(self, x: str, grid: Grid, output: str) -> str:
        """Real numbers rounded half to even and saturated to ``grid``."""
        zero = self.zero if grid.signed else self.builder.constant(np.uint8(0))
        wide = output if grid.bits == 8 else f"{output}.wide"
        return self.clip(self.builder.node("QuantizeLinear", [x, self.one, zero], wide), grid, output)

    def clip(self, x: str, grid: Grid, output: str) -> str:
        """Saturate 8-bit integers to fewer bits."""
        if grid.bits == 8:
            return x
        shift = ZERO if grid.signed else 0
        bounds = [self.builder.constant(np.uint8(bound + shift)) for bound in (grid.low, grid.high)]
        return self.builder.node("Clip", [x, *bounds], output)

    def index(self, x: str, output: str) -> str:
        """Signed integers plus 128, as int32."""
        return self.builder.node("Cast", [x], output, to=INT32)

    def as_uint8(self, x: str, output: str) -> str:
        """Signed integers as uint8 with zero point 128."""
        return x

    def image(self, grid: Grid, output: str) -> str:
        """The graph's normalized float input on the image's grid."""
        scale = self.builder.constant(np.float32(grid.scale), "image_scale")
        zero_point = self.builder.constant(np.uint8(grid.zero_point), "image_zero_point")
        return self.builder.node("QuantizeLinear", [INPUT, scale, zero_point], output)

    def raw_image(self, grid: Grid, gain: Array, offset: Array, output: str, *, channels_last: bool) -> str:
        """The graph's raw pixels on the image's grid; see `fold_normalization`."""
        pixels = INPUT
        if channels_last:
            pixels = self.builder.node("Transpose", [INPUT], f"{output}.first", perm=TO_FIRST)
        real = self.builder.node(
            "DequantizeLinear",
            [pixels, self.builder.constant(gain, "image_gain"), self.builder.constant(np.zeros(3, np.uint8))],
            f"{output}.scaled",
            axis=1,
        )
        shift = self.builder.constant(offset.reshape(1, 3, 1, 1), "image_offset")
        return self.rounded_image(self.builder.node("Add", [real, shift], f"{output}.shifted"), grid, output)

    def rounded_image(self, x: str, grid: Grid, output: str) -> str:
        """Real numbers in steps of the image's grid, rounded to it."""
        zero_point = self.builder.constant(np.uint8(grid.zero_point), "image_zero_point")
        return self.builder.node("QuantizeLinear", [x, self.one, zero_point], output)

    def vector(self, values: Array, width: int, output: str) -> str:
        """Signed integers (C,) as a constant to broadcast against (N, C, H, ``width``)."""
        stored = (values.astype(np.int16) + ZERO).astype(np.uint8).reshape(1, -1, 1, 1)
        if width == 1 or len(values) > REPEATED_CHANNELS:
            return self.builder.constant(stored, output)
        # One value per channel in the file; runtimes repeat it once, at load.
        shape = self.builder.constant(np.array([1, len(values), 1, width]))
        return self.builder.node("Expand", [self.builder.constant(stored, f"{output}.values"), shape], output)

    def image_vector(self, x: str, channels: int, width: int, output: str) -> str:
        """A vector of each image, to broadcast against (N, C, H, ``width``)."""
        if width > 1 and channels <= REPEATED_CHANNELS:
            repeats = self.builder.constant(np.array([1, 1, width, 1]))
            x = self.builder.node("Tile", [x, repeats], f"{output}.repeated")
        return self.builder.node("Transpose", [x], output, perm=TO_FIRST)

    # Element-wise arithmetic.

    def binary(
        self, operator: str, a: tuple[str, Factor], b: tuple[str, Factor], grid: Grid, output: str
    ) -> str:
        """``saturate((a * multiplier) operator (b * multiplier))``."""
        left = self.real(a[0], a[1], f"{output}.left")
        right = self.real(b[0], b[1], f"{output}.right")
        return self.integer(self.builder.node(operator, [left, right], f"{output}.real"), grid, output)

    def prelu(self, x: str, slopes: Slopes, grid: Grid, width: int, output: str) -> str:
        """``max(x, x * slope)`` where no slope exceeds 1, else a selection by the sign of ``x``."""
        constant = self.vector(slopes.integers, width, f"{output}.slopes")
        scale = float(np.ldexp(1.0, -slopes.shift))
        scaled = self.binary("Mul", (x, 1.0), (constant, scale), grid, f"{output}.scaled")
        if float(slopes.integers.max()) * scale <= 1.0:
            return self.builder.node("Max", [x, scaled], output)
        negative = self.builder.node("Less", [x, self.zero], f"{output}.negative")
        return self.builder.node("Where", [negative, scaled, x], output)

    def sign(self, x: str, conv: BinaryConv, width: int, output: str) -> str:
        """±ACCUMULATOR_UNIT: + where ``x >= threshold``.

        ``2 U (x - threshold) + U`` is at least U for every x at or above the threshold, else at most -U, so
        one fused addition and a Clip give the sign: faster than Greater and Where.
        """
        unit = ACCUMULATOR_UNIT
        low, high = (self.builder.constant(np.uint8(ZERO + sign * unit)) for sign in (-1, 1))
        if (conv.threshold <= ALWAYS).any():
            # -threshold = 128 has no place in the 8 bits of the constant.
            return self.builder.node("Where", [self.positive(x, conv, width, output), high, low], output)
        assert int(conv.threshold.max()) <= NEVER
        negated = self.vector(-conv.threshold, width, f"{output}.negated_threshold")
        left = self.real(x, 2.0 * unit, f"{output}.left")
        right = self.real(negated, 2.0 * unit, f"{output}.right")
        total = self.builder.node("Add", [left, right], f"{output}.real")
        zero = self.builder.constant(np.uint8(ZERO + unit))
        wide = self.builder.node("QuantizeLinear", [total, self.one, zero], f"{output}.wide")
        return self.builder.node("Clip", [wide, low, high], output)

    def positive(self, x: str, conv: BinaryConv, width: int, output: str) -> str:
        """Boolean ``x >= threshold``: above ``threshold - 1``, or in a channel where every x is."""
        always = conv.threshold <= ALWAYS
        bound = np.where(always, 0, conv.threshold.astype(np.int32) - 1)
        bounds = self.vector(bound, width, f"{output}.bound")
        above = self.builder.node("Greater", [x, bounds], f"{output}.above")
        mask = self.builder.constant(always.reshape(1, -1, 1, 1), f"{output}.always")
        return self.builder.node("Or", [above, mask], f"{output}.positive")

    # Convolutions.

    def affine_conv(
        self, x: str, layer: Affine, source: Grid, grid: Grid, output: str, *, strides: int = 1, pads: int = 0
    ) -> str:
        """Convolution of ``x`` on ``source`` with integer weights of several bits; 2-D ones are 1×1 kernels.

        Weights are uint8 with zero point 128: uint8 × int8 with large weights overflows the 16-bit
        intermediate of processors without VNNI.
        """
        weight = layer.weight if layer.weight.ndim == 4 else layer.weight[:, :, None, None]
        stored = self.builder.constant((weight.astype(np.int16) + ZERO).astype(np.uint8), f"{output}.weight")
        zero = np.full(len(weight), ZERO, np.uint8)
        x_zero = ZERO if source.signed else source.zero_point
        return self.convolution(x, x_zero, stored, zero, layer, grid, output, strides, pads)

    def binary_conv(self, x: str, conv: BinaryConv, grid: Grid, width: int, output: str) -> str:
        """Threshold, then convolution with ±1 weights unpacked from their bits."""
        name = output.removesuffix("/conv")
        sign = self.sign(x, conv, width, f"{name}/sign")
        weight = self.unpacked(conv, f"{name}/binary_weight")
        zero = np.zeros(conv.channels, np.int8)
        pads = conv.kernel_size // 2
        return self.convolution(sign, ZERO, weight, zero, conv, grid, output, conv.stride, pads)

    def convolution(
        self,
        x: str,
        x_zero: int,
        weight: str,
        weight_zero: Array,
        layer: Affine | BinaryConv,
        grid: Grid,
        output: str,
        strides: int,
        pads: int,
    ) -> str:
        """``saturate(float32(conv + bias) * multiplier)``: scales of input and output are 1."""
        wide = output if grid.bits == 8 else f"{output}.wide"
        self.builder.node(
            "QLinearConv",
            [
                x,
                self.one,
                self.builder.constant(np.uint8(x_zero)),
                weight,
                self.builder.constant(layer.multiplier, f"{output}.multiplier"),
                self.builder.constant(weight_zero),
                self.one,
                self.zero if grid.signed else self.builder.constant(np.uint8(0)),
                self.builder.constant(layer.bias, f"{output}.bias"),
            ],
            wide,
            strides=[strides] * 2,
            pads=[pads] * 4,
        )
        return self.clip(wide, grid, output)

    def unpacked(self, conv: BinaryConv, output: str) -> str:
        """±1 int8 weights from their bits, looked up in a 256×8 table; runtimes fold that at load."""
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
        table = self.builder.constant((2 * bits.astype(np.int8) - 1).astype(np.int8))
        stored = self.builder.constant(conv.sign_bits, f"{output}.bits")
        index = self.builder.node("Cast", [stored], f"{output}.index", to=INT32)
        flat = self.builder.node("Gather", [table, index], f"{output}.rows", axis=0)
        count = int(np.prod(conv.shape))
        if count % 8:  # the last byte is not full
            line = self.builder.constant(np.array([-1]))
            flat = self.builder.node("Reshape", [flat, line], f"{output}.line")
            ends = [self.builder.constant(np.array([edge])) for edge in (0, count)]
            flat = self.builder.node("Slice", [flat, *ends], f"{output}.used")
        return self.builder.node("Reshape", [flat, self.builder.constant(np.array(conv.shape))], output)

    def classifier(self, x: str, layer: Affine, output: str) -> str:
        """Logits ``float32(weight · x + bias) * multiplier`` of pooled integers, C values each."""
        channels = layer.weight.shape[1]
        flat = self.builder.node("Reshape", [x, self.builder.constant(np.array([0, channels]))], "head/flat")
        flat = self.as_uint8(flat, "head/flat.uint8")
        stored = (layer.weight.T.astype(np.int16) + ZERO).astype(np.uint8)
        weight = self.builder.constant(stored, "fc.weight")
        zero = self.builder.constant(np.uint8(ZERO))
        total = self.builder.node("MatMulInteger", [flat, weight, zero, zero], "fc/products")
        biased = self.builder.node("Add", [total, self.builder.constant(layer.bias, "fc.bias")], "fc/total")
        scale = self.builder.constant(layer.multiplier, "fc.multiplier")
        return self.builder.node("DequantizeLinear", [biased, scale], output, axis=1)

    # Means.

    def mean(self, x: str, channels: int, pixels: int, multiplier: Array, output: str) -> str:
        """Exact sums over the image times ``multiplier / pixels``: (N, 1, 1, C) float32."""
        last = self.builder.node("Transpose", [x], f"{output}.last", perm=TO_LAST)
        shape = self.builder.constant(np.array([0, 1, pixels, channels]))
        columns = self.builder.node("Reshape", [last, shape], f"{output}.columns")
        row = self.builder.constant(np.array([1, pixels]))
        one = self.builder.constant(np.uint8(1))
        ones = self.builder.node("Expand", [one, row], f"{output}.ones")
        zeros = [self.builder.constant(np.uint8(0)), self.zero]
        total = self.builder.node("MatMulInteger", [ones, columns, *zeros], f"{output}.sum")
        factor = self.builder.constant(per_pixel(multiplier, pixels), f"{output}.multiplier")
        return self.builder.node("DequantizeLinear", [total, factor], output, axis=3)

    def pool2x2(self, x: str, channels: int, output: str) -> str:
        """Mean of each 2×2 window of even sides: a convolution by channel (AveragePool is slow)."""
        ones = self.builder.constant(np.ones((channels, 1, 2, 2), np.int8))
        zero = self.builder.constant(np.int8(0))
        quarter = self.builder.constant(np.float32(0.25))
        inputs = [x, self.one, self.zero, ones, quarter, zero, self.one, self.zero]
        return self.builder.node("QLinearConv", inputs, output, group=channels, strides=[2, 2])

    def pad_to_even(self, x: str, output: str) -> str:
        """Replicate the last row and column (sides are odd)."""
        pads = self.builder.constant(np.array([0, 0, 0, 0, 0, 0, 1, 1]))
        return self.builder.node("Pad", [x, pads], output, mode="edge")


def per_pixel(multiplier: Array, pixels: int) -> NDArray[np.float32]:
    """``multiplier / pixels`` in float32, as the specification rounds it."""
    return np.asarray(multiplier / np.float32(pixels), dtype=np.float32)
