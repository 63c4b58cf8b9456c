"""The operations of the strict form, for runtimes that compute quantized operators differently.

Integers are stored as float32 numbers without a zero point; rounding is Round, saturation is Clip. The reason
is OpenVINO 2026.4: it refuses QLinearConv with a scale per channel, and moves the zero point of a
DequantizeLinear through a ReduceSum without scaling it. The operators here leave it nothing to rewrite.
onnxruntime computes the same numbers, about five times slower than with :mod:`qat_export.graphs.operators`.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from qat.errors import QuantizationError
from qat.grid import Grid
from qat_export.graphs.builder import FLOAT, INT32, UINT8, GraphBuilder
from qat_export.graphs.metadata import INPUT
from qat_export.graphs.operators import IntegerOperators, Products
from qat_export.graphs.storage import ZERO, Array, Factor
from qat_export.integer.network import Affine, BinaryConv

#: Largest magnitude up to which float32 holds every integer exactly.
_EXACT: Final = 2**24


class StrictOperators(IntegerOperators):
    """Operations with integers held in float32, in which sums up to 2²⁴ are exact.

    Sums of binary convolutions are at most 64 · 9 · 2048, which is exact. A bias beyond 2²⁴ is rounded, but a
    channel with such a bias is saturated whatever its sum. Other sums that could exceed 2²⁴ are refused.

    Raises:
        QuantizationError: from :meth:`mean` if the trunk has more than 362×362 pixels, and from
            :meth:`affine_conv` if the magnitudes of a layer's weights add up to too much.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        """Make one that appends to the graph of ``builder``."""
        super().__init__(builder)
        self.zero = builder.constant(self.stored(0))

    def stored(self, integers: Array | int) -> Array:
        """See the base class."""
        return np.asarray(integers, np.float32)

    def real(self, x: str, multiplier: Factor, output: str) -> str:
        """See the base class."""
        if multiplier == 1:
            return x
        return self.builder.node("Mul", [x, self.builder.constant(np.float32(multiplier))], output)

    def integer(self, x: str, grid: Grid, output: str) -> str:
        """See the base class."""
        return self.saturated(x, grid.low, grid.high, output)

    def saturated(self, x: str, low: int, high: int, output: str) -> str:
        """``x`` rounded half to even, then clamped to ``low`` … ``high``."""
        bounds = [self.builder.constant(self.stored(bound)) for bound in (low, high)]
        rounded = self.builder.node("Round", [x], f"{output}.rounded")
        return self.builder.node("Clip", [rounded, *bounds], output)

    def index(self, x: str, output: str) -> str:
        """See the base class."""
        return self.builder.node("Cast", [self.shifted(x, f"{output}.shifted")], output, to=INT32)

    def as_uint8(self, x: str, output: str) -> str:
        """See the base class."""
        return self.builder.node("Cast", [self.shifted(x, f"{output}.shifted")], output, to=UINT8)

    def shifted(self, x: str, output: str) -> str:
        """``x + 128``."""
        return self.builder.node("Add", [x, self.builder.constant(self.stored(ZERO))], output)

    def image(self, grid: Grid, output: str) -> str:
        """See the base class."""
        scale = self.builder.constant(np.float32(grid.scale), "image_scale")
        return self.rounded_image(self.builder.node("Div", [INPUT, scale], f"{output}.real"), grid, output)

    def scaled_pixels(self, pixels: str, gain: Array, output: str) -> str:
        """See the base class."""
        real = self.builder.node("Cast", [pixels], f"{output}.pixels", to=FLOAT)
        factor = self.builder.constant(gain.reshape(1, 3, 1, 1), "image_gain")
        return self.builder.node("Mul", [real, factor], f"{output}.scaled")

    def rounded_image(self, x: str, grid: Grid, output: str) -> str:
        """See the base class; here the integers are relative to the zero point."""
        return self.saturated(x, grid.low - grid.zero_point, grid.high - grid.zero_point, output)

    def is_repeated(self, channels: int, width: int) -> bool:
        """False: repeated vectors make only onnxruntime's integer operators faster, not used here."""
        return False

    def sign(self, x: str, conv: BinaryConv, width: int, output: str) -> str:
        """See the base class."""
        return self.selected_sign(x, conv, width, output)

    def convolution(self, products: Products, layer: Affine | BinaryConv, grid: Grid, output: str) -> str:
        """See the base class."""
        weights = self.builder.node("Cast", [products.weight], f"{output}.weight_real", to=FLOAT)
        if products.weight_zero.any():
            zero = self.builder.constant(self.stored(ZERO))
            weights = self.builder.node("Sub", [weights, zero], f"{output}.weights")
        unscaled = self.builder.node(
            "Conv",
            [products.x, weights],
            f"{output}.products",
            strides=[products.stride] * 2,
            pads=[products.padding] * 4,
        )
        bias = self.stored(layer.bias).reshape(1, -1, 1, 1)
        total = self.builder.node(
            "Add", [unscaled, self.builder.constant(bias, f"{output}.bias")], f"{output}.total"
        )
        # The sum is an integer, which rounding does not change. But without the Round, runtimes would fold
        # the multiplier into the weights.
        total = self.builder.node("Round", [total], f"{output}.accumulator")
        factor = self.builder.constant(layer.multiplier.reshape(1, -1, 1, 1), f"{output}.multiplier")
        return self.integer(self.builder.node("Mul", [total, factor], f"{output}.real"), grid, output)

    def affine_conv(
        self, x: str, layer: Affine, source: Grid, grid: Grid, output: str, *, strides: int = 1, pads: int = 0
    ) -> str:
        """See the base class."""
        weights = np.abs(layer.weight.astype(np.int64)).reshape(len(layer.weight), -1).sum(1)
        reach = max(source.high - source.zero_point, source.zero_point - source.low)
        _require_exact(int(weights.max()) * reach, output)
        return super().affine_conv(x, layer, source, grid, output, strides=strides, pads=pads)

    def mean(self, x: str, channels: int, pixels: int, multiplier: Array, output: str) -> str:
        """See the base class."""
        _require_exact(ZERO * pixels, output)
        return super().mean(x, channels, pixels, multiplier, output)

    def sums(self, x: str, channels: int, pixels: int, output: str) -> str:
        """See the base class."""
        axes = self.builder.constant(np.array([1, 2]))
        return self.builder.node("ReduceSum", [x, axes], f"{output}.sum")

    def multiplied_sums(self, sums: str, factor: str, output: str) -> str:
        """See the base class."""
        return self.builder.node("Mul", [sums, factor], output)

    def pool2x2(self, x: str, channels: int, output: str) -> str:
        """See the base class."""
        mean = self.builder.node("AveragePool", [x], f"{output}.real", kernel_shape=[2, 2], strides=[2, 2])
        return self.integer(mean, Grid(1.0, 8, signed=True), output)


def _require_exact(largest: int, output: str) -> None:
    if largest > _EXACT:
        raise QuantizationError(
            f"{output}: sums up to {largest:,} don't fit float32, which holds integers up to {_EXACT:,}: "
            "no strict form of this network and image size; the default form has no such limit"
        )
