"""How integers lie in the tensors of a portable graph: on the way in, between operations, and as constants.

Signed 8-bit tensors are stored as uint8 with zero point 128, since onnxruntime's fast convolution reads
and writes uint8. onnxruntime computes convolutions with channels last and keeps that order in between, so
vectors of few channels are repeated along the width: one broadcast then runs over a row instead of over one
pixel (measurements: docs/performance.md).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qat.grid import Grid
from qat_export.graphs.builder import INT32, GraphBuilder
from qat_export.graphs.metadata import INPUT

#: uint8 that stands for 0 in a signed tensor.
ZERO: Final = 128
#: Vectors of at most so many channels are repeated along the width.
REPEATED_CHANNELS: Final = 256
#: Axis orders between channels first and channels last.
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
Array = NDArray[Any]
Factor = float | np.float32


class IntegerStorage:
    """Appends conversions between integers and real numbers to a graph.

    Arguments and results are names of tensors; results are ``output``. "Real" numbers are float32 numbers
    before they are rounded to a grid.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        """Append to ``builder``."""
        self.builder = builder
        self.one = builder.constant(np.float32(1))
        self.zero = builder.constant(np.uint8(ZERO))

    def stored(self, integers: Array | int) -> Array:
        """Signed integers in the type in which the graph's tensors hold them."""
        return (np.asarray(integers, np.int16) + ZERO).astype(np.uint8)

    def real(self, x: str, multiplier: Factor, output: str) -> str:
        """The integers of ``x`` times ``multiplier`` in float32.

        For one reader alone: onnxruntime fuses a DequantizeLinear only into a single one.
        """
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
        real = self.scaled_pixels(pixels, gain, output)
        shift = self.builder.constant(offset.reshape(1, 3, 1, 1), "image_offset")
        return self.rounded_image(self.builder.node("Add", [real, shift], f"{output}.shifted"), grid, output)

    def scaled_pixels(self, pixels: str, gain: Array, output: str) -> str:
        """Raw pixels times ``gain`` (3,): real numbers named ``output`` with ``.scaled``."""
        constants = self.builder.constant(gain, "image_gain"), self.builder.constant(np.zeros(3, np.uint8))
        return self.builder.node("DequantizeLinear", [pixels, *constants], f"{output}.scaled", axis=1)

    def rounded_image(self, x: str, grid: Grid, output: str) -> str:
        """Real numbers, in multiples of the scale of the image's grid, rounded to that grid."""
        zero_point = self.builder.constant(np.uint8(grid.zero_point), "image_zero_point")
        return self.builder.node("QuantizeLinear", [x, self.one, zero_point], output)

    def vector(self, values: Array, width: int, output: str) -> str:
        """Signed integers (C,) as a constant to broadcast against (N, C, H, ``width``)."""
        stored = self.stored(values).reshape(1, -1, 1, 1)
        if not self.is_repeated(len(values), width):
            return self.builder.constant(stored, output)
        # One value per channel in the file; runtimes repeat it once, at load.
        shape = self.builder.constant(np.array([1, len(values), 1, width]))
        return self.builder.node("Expand", [self.builder.constant(stored, f"{output}.values"), shape], output)

    def is_repeated(self, channels: int, width: int) -> bool:
        """Whether a vector is repeated along the width of the image that it is broadcast against."""
        return width > 1 and channels <= REPEATED_CHANNELS

    def image_vector(self, x: str, channels: int, width: int, output: str) -> str:
        """A vector of each image, to broadcast against (N, C, H, ``width``)."""
        if self.is_repeated(channels, width):
            repeats = self.builder.constant(np.array([1, 1, width, 1]))
            x = self.builder.node("Tile", [x, repeats], f"{output}.repeated")
        return self.builder.node("Transpose", [x], output, perm=TO_FIRST)
