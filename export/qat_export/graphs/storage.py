"""How the tensors of a portable graph hold integers: the image, results of operations, and constants.

Signed 8-bit tensors are stored as uint8 with zero point 128, since onnxruntime's fast convolution reads and
writes uint8. onnxruntime keeps channels last between convolutions. There, a vector of few channels that is
broadcast over an image makes very short inner loops, so it is repeated along the width, and each loop runs
over a row of pixels instead of a single one (measurements: docs/performance.md).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qat.grid import Grid
from qat_export.graphs.builder import INT32, GraphBuilder
from qat_export.graphs.metadata import INPUT

#: Zero point of signed tensors: the uint8 that stands for 0.
ZERO: Final = 128
#: Largest number of channels of a vector that is repeated along the width.
REPEATED_CHANNELS: Final = 256
#: Orders of axes for Transpose: from channels first to channels last, and back.
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
Array = NDArray[Any]
Factor = float | np.float32


class IntegerStorage:
    """Appends conversions between integers and real numbers to a graph.

    Tensors are passed by name. A method names its result ``output`` and returns that name. "Real" numbers are
    float32 numbers before they are rounded to a grid.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        """Make one that appends to the graph of ``builder``."""
        self.builder = builder
        self.one = builder.constant(np.float32(1))
        self.zero = builder.constant(np.uint8(ZERO))

    def stored(self, integers: Array | int) -> Array:
        """Signed integers as the array that the graph stores for them, here uint8 with zero point 128."""
        return (np.asarray(integers, np.int16) + ZERO).astype(np.uint8)

    def real(self, x: str, multiplier: Factor, output: str) -> str:
        """The integers of ``x`` times ``multiplier``, in float32.

        Call it anew for each operation that reads the result: onnxruntime fuses a DequantizeLinear only if it
        has a single reader.
        """
        scale = self.builder.constant(np.float32(multiplier))
        return self.builder.node("DequantizeLinear", [x, scale, self.zero], output)

    def integer(self, x: str, grid: Grid, output: str) -> str:
        """Real numbers rounded half to even and saturated to ``grid``."""
        zero = self.zero if grid.signed else self.builder.constant(np.uint8(0))
        wide = output if grid.bits == 8 else f"{output}.wide"
        return self.clip(self.builder.node("QuantizeLinear", [x, self.one, zero], wide), grid, output)

    def clip(self, x: str, grid: Grid, output: str) -> str:
        """Saturate 8-bit integers to a grid of fewer bits."""
        if grid.bits == 8:
            return x
        shift = ZERO if grid.signed else 0
        bounds = [self.builder.constant(np.uint8(bound + shift)) for bound in (grid.low, grid.high)]
        return self.builder.node("Clip", [x, *bounds], output)

    def index(self, x: str, output: str) -> str:
        """Signed integers plus 128 as int32, to index a table of 256 entries."""
        return self.builder.node("Cast", [x], output, to=INT32)

    def as_uint8(self, x: str, output: str) -> str:
        """Signed integers as uint8 with zero point 128."""
        return x

    def image(self, grid: Grid, output: str) -> str:
        """The graph's normalized float input, rounded to the grid of the image."""
        scale = self.builder.constant(np.float32(grid.scale), "image_scale")
        zero_point = self.builder.constant(np.uint8(grid.zero_point), "image_zero_point")
        return self.builder.node("QuantizeLinear", [INPUT, scale, zero_point], output)

    def raw_image(self, grid: Grid, gain: Array, offset: Array, output: str, *, channels_last: bool) -> str:
        """The graph's raw pixels on the grid of the image.

        ``gain`` and ``offset`` are from :func:`qat_export.graphs.pixels.fold_normalization`.
        """
        pixels = INPUT
        if channels_last:
            pixels = self.builder.node("Transpose", [INPUT], f"{output}.first", perm=TO_FIRST)
        real = self.scaled_pixels(pixels, gain, output)
        shift = self.builder.constant(offset.reshape(1, 3, 1, 1), "image_offset")
        return self.rounded_image(self.builder.node("Add", [real, shift], f"{output}.shifted"), grid, output)

    def scaled_pixels(self, pixels: str, gain: Array, output: str) -> str:
        """Raw pixels times ``gain`` (3,), real numbers; their name is ``output`` plus ``.scaled``."""
        constants = self.builder.constant(gain, "image_gain"), self.builder.constant(np.zeros(3, np.uint8))
        return self.builder.node("DequantizeLinear", [pixels, *constants], f"{output}.scaled", axis=1)

    def rounded_image(self, x: str, grid: Grid, output: str) -> str:
        """Real numbers, in steps of the image's grid, rounded to that grid."""
        zero_point = self.builder.constant(np.uint8(grid.zero_point), "image_zero_point")
        return self.builder.node("QuantizeLinear", [x, self.one, zero_point], output)

    def vector(self, values: Array, width: int, output: str) -> str:
        """Signed integers (C,) as a constant to broadcast against (N, C, H, ``width``)."""
        stored = self.stored(values).reshape(1, -1, 1, 1)
        if not self.is_repeated(len(values), width):
            return self.builder.constant(stored, output)
        # The file has one value per channel. Runtimes repeat it once, when they load the model.
        shape = self.builder.constant(np.array([1, len(values), 1, width]))
        return self.builder.node("Expand", [self.builder.constant(stored, f"{output}.values"), shape], output)

    def is_repeated(self, channels: int, width: int) -> bool:
        """Whether a vector is repeated along the width of the image that it is broadcast against."""
        return width > 1 and channels <= REPEATED_CHANNELS

    def image_vector(self, x: str, channels: int, width: int, output: str) -> str:
        """A vector of each image, (N, 1, 1, C), in a form that broadcasts against (N, C, H, ``width``)."""
        if self.is_repeated(channels, width):
            repeats = self.builder.constant(np.array([1, 1, width, 1]))
            x = self.builder.node("Tile", [x, repeats], f"{output}.repeated")
        return self.builder.node("Transpose", [x], output, perm=TO_FIRST)
