"""The operations of an integer network in standard ONNX operators, chosen for their speed in onnxruntime.

Element-wise arithmetic is written as float arithmetic between DequantizeLinear and QuantizeLinear, with a
scale of 1 or a dyadic multiplier (an integer over a power of two). The float32 values are exact, and
onnxruntime fuses the group into one integer operator. Sums over the image are computed with channels last,
the order in which onnxruntime keeps tensors between convolutions (measurements: docs/performance.md).

:mod:`qat_export.graphs.strict_operators` overrides the operations that other runtimes compute differently.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qat.grid import Grid
from qat.quantize.dyadic import ACCUMULATOR_UNIT
from qat_export.graphs.builder import INT32
from qat_export.graphs.storage import TO_LAST, ZERO, Array, Factor, IntegerStorage
from qat_export.integer.network import ALWAYS, NEVER, Affine, BinaryConv, Slopes


class Products(NamedTuple):
    """The inputs of a convolution, without bias and requantization.

    Attributes:
        x: name of the activations (N, I, H, W).
        x_zero: zero point of the activations.
        weight: name of the weights (O, I, k, k).
        weight_zero: zero point of each output channel's weights, (O,).
        stride, padding: stride and padding, the same for both sides.
    """

    x: str
    x_zero: int
    weight: str
    weight_zero: Array
    stride: int
    padding: int


class IntegerOperators(IntegerStorage):
    """Appends operations to a graph.

    Tensors are passed by name. A method names its result ``output`` and returns that name. Activations are
    (N, C, H, W), vectors of an image (N, 1, 1, C). Tensors lie on grids of integers, except those called
    "real", which hold float32 numbers before they are rounded to a grid.
    """

    # Element-wise arithmetic.

    def elementwise(
        self, operator: str, a: tuple[str, Factor], b: tuple[str, Factor], grid: Grid, output: str
    ) -> str:
        """``saturate((a * multiplier) operator (b * multiplier))``."""
        left = self.real(a[0], a[1], f"{output}.left")
        right = self.real(b[0], b[1], f"{output}.right")
        return self.integer(self.builder.node(operator, [left, right], f"{output}.real"), grid, output)

    def prelu(self, x: str, slopes: Slopes, grid: Grid, width: int, output: str) -> str:
        """PReLU: ``max(x, x * slope)`` if no slope exceeds 1, else a selection by the sign of ``x``."""
        constant = self.vector(slopes.integers, width, f"{output}.slopes")
        scale = float(np.ldexp(1.0, -slopes.shift))
        scaled = self.elementwise("Mul", (x, 1.0), (constant, scale), grid, f"{output}.scaled")
        if float(slopes.integers.max()) * scale <= 1.0:
            return self.builder.node("Max", [x, scaled], output)
        negative = self.builder.node("Less", [x, self.zero], f"{output}.negative")
        return self.builder.node("Where", [negative, scaled, x], output)

    def sign(self, x: str, conv: BinaryConv, width: int, output: str) -> str:
        """``U`` if ``x >= threshold``, else ``-U``, with ``U`` = ACCUMULATOR_UNIT.

        ``2 U (x - threshold) + U`` is at least U for every x at or above the threshold, else at most -U. So
        one fused addition and a Clip to -U … U give the sign, faster than Greater and Where.
        """
        if (conv.threshold <= ALWAYS).any():
            # The constant has 8 bits, and can't hold -threshold = 128.
            return self.selected_sign(x, conv, width, output)
        assert int(conv.threshold.max()) <= NEVER
        unit = ACCUMULATOR_UNIT
        low, high = self.unit_signs()
        negated = self.vector(-conv.threshold, width, f"{output}.negated_threshold")
        left = self.real(x, 2.0 * unit, f"{output}.left")
        right = self.real(negated, 2.0 * unit, f"{output}.right")
        total = self.builder.node("Add", [left, right], f"{output}.real")
        zero = self.builder.constant(np.uint8(ZERO + unit))
        wide = self.builder.node("QuantizeLinear", [total, self.one, zero], f"{output}.wide")
        return self.builder.node("Clip", [wide, low, high], output)

    def selected_sign(self, x: str, conv: BinaryConv, width: int, output: str) -> str:
        """The same as :meth:`sign`, for any thresholds, by a comparison and a selection."""
        low, high = self.unit_signs()
        return self.builder.node("Where", [self.positive(x, conv, width, output), high, low], output)

    def unit_signs(self) -> tuple[str, str]:
        """Names of the constants ``-ACCUMULATOR_UNIT`` and ``ACCUMULATOR_UNIT``."""
        low, high = (self.builder.constant(self.stored(sign * ACCUMULATOR_UNIT)) for sign in (-1, 1))
        return low, high

    def positive(self, x: str, conv: BinaryConv, width: int, output: str) -> str:
        """Boolean ``x >= threshold``, written as ``x > threshold - 1``.

        Channels in which every x is at least the threshold are true by a constant.
        """
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
        """Convolution of ``x``, which lies on ``source``, with a layer's integer weights (more than one bit).

        Weights (O, I) are 1×1 kernels. Weights are stored as uint8 with zero point 128: on processors without
        VNNI, onnxruntime's products of uint8 and large int8 weights overflow an intermediate of 16 bits.
        """
        weight = layer.weight if layer.weight.ndim == 4 else layer.weight[:, :, None, None]
        stored = self.builder.constant((weight.astype(np.int16) + ZERO).astype(np.uint8), f"{output}.weight")
        zero = np.full(len(weight), ZERO, np.uint8)
        x_zero = ZERO if source.signed else source.zero_point
        return self.convolution(Products(x, x_zero, stored, zero, strides, pads), layer, grid, output)

    def binary_conv(self, x: str, conv: BinaryConv, grid: Grid, width: int, output: str) -> str:
        """Binary convolution: sign by threshold, then a convolution with weights ±1 unpacked from bits."""
        name = output.removesuffix("/conv")
        sign = self.sign(x, conv, width, f"{name}/sign")
        weight = self.unpacked(conv, f"{name}/binary_weight")
        zero = np.zeros(conv.channels, np.int8)
        products = Products(sign, ZERO, weight, zero, conv.stride, conv.kernel_size // 2)
        return self.convolution(products, conv, grid, output)

    def convolution(self, products: Products, layer: Affine | BinaryConv, grid: Grid, output: str) -> str:
        """``saturate(float32(convolution + bias) * multiplier)``, as a QLinearConv.

        The scales of its input and output are 1; those of its weights are the multipliers.
        """
        wide = output if grid.bits == 8 else f"{output}.wide"
        self.builder.node(
            "QLinearConv",
            [
                products.x,
                self.one,
                self.builder.constant(np.uint8(products.x_zero)),
                products.weight,
                self.builder.constant(layer.multiplier, f"{output}.multiplier"),
                self.builder.constant(products.weight_zero),
                self.one,
                self.zero if grid.signed else self.builder.constant(np.uint8(0)),
                self.builder.constant(layer.bias, f"{output}.bias"),
            ],
            wide,
            strides=[products.stride] * 2,
            pads=[products.padding] * 4,
        )
        return self.clip(wide, grid, output)

    def unpacked(self, conv: BinaryConv, output: str) -> str:
        """Weights ±1, int8, unpacked by looking up each byte in a 256×8 table.

        Runtimes compute this once, when they load the model.
        """
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
        table = self.builder.constant((2 * bits.astype(np.int8) - 1).astype(np.int8))
        stored = self.builder.constant(conv.sign_bits, f"{output}.bits")
        index = self.builder.node("Cast", [stored], f"{output}.index", to=INT32)
        flat = self.builder.node("Gather", [table, index], f"{output}.rows", axis=0)
        count = int(np.prod(conv.shape))
        if count % 8:  # some bits of the last byte are not weights
            line = self.builder.constant(np.array([-1]))
            flat = self.builder.node("Reshape", [flat, line], f"{output}.line")
            ends = [self.builder.constant(np.array([edge])) for edge in (0, count)]
            flat = self.builder.node("Slice", [flat, *ends], f"{output}.used")
        return self.builder.node("Reshape", [flat, self.builder.constant(np.array(conv.shape))], output)

    def classifier(self, x: str, layer: Affine, output: str) -> str:
        """Logits ``float32(weight · x + bias) * multiplier`` of the pooled integers ``x``, C per image."""
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
        total = self.sums(last, channels, pixels, output)
        factor = self.builder.constant(per_pixel(multiplier, pixels), f"{output}.multiplier")
        return self.multiplied_sums(total, factor, output)

    def sums(self, x: str, channels: int, pixels: int, output: str) -> str:
        """Exact sums over the image of ``x`` (N, H, W, C); their name is ``output`` with ``.sum`` appended.

        They are computed as a product with a matrix of ones, since ReduceSum of 8-bit integers is slow.
        """
        shape = self.builder.constant(np.array([0, 1, pixels, channels]))
        columns = self.builder.node("Reshape", [x, shape], f"{output}.columns")
        row = self.builder.constant(np.array([1, pixels]))
        one = self.builder.constant(np.uint8(1))
        ones = self.builder.node("Expand", [one, row], f"{output}.ones")
        zeros = [self.builder.constant(np.uint8(0)), self.zero]
        return self.builder.node("MatMulInteger", [ones, columns, *zeros], f"{output}.sum")

    def multiplied_sums(self, sums: str, factor: str, output: str) -> str:
        """The result of :meth:`sums` times a factor per channel, in float32."""
        return self.builder.node("DequantizeLinear", [sums, factor], output, axis=3)

    def pool2x2(self, x: str, channels: int, output: str) -> str:
        """Mean of each 2×2 window; sides are even. A depthwise convolution, since AveragePool is slow."""
        ones = self.builder.constant(np.ones((channels, 1, 2, 2), np.int8))
        zero = self.builder.constant(np.int8(0))
        quarter = self.builder.constant(np.float32(0.25))
        inputs = [x, self.one, self.zero, ones, quarter, zero, self.one, self.zero]
        return self.builder.node("QLinearConv", inputs, output, group=channels, strides=[2, 2])

    def pad_to_even(self, x: str, output: str) -> str:
        """Repeat the last row and the last column; both sides are odd."""
        pads = self.builder.constant(np.array([0, 0, 0, 0, 0, 0, 1, 1]))
        return self.builder.node("Pad", [x, pads], output, mode="edge")


def per_pixel(multiplier: Array, pixels: int) -> NDArray[np.float32]:
    """``multiplier / pixels`` in float32, rounded as in :mod:`qat_export.integer.reference`."""
    return np.asarray(multiplier / np.float32(pixels), dtype=np.float32)
