"""The grid of a quantized tensor, as quantization, the integer network and the native library describe it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grid:
    """The values that one tensor can take: ``value = scale · (q − zero_point)`` for each integer ``q``.

    Attributes:
        scale: distance between neighbouring values, above 0.
        bits: width of the integers.
        signed: whether the integers are two's complement; otherwise they start at 0.
        zero_point: the integer that stands for the value 0.
    """

    scale: float
    bits: int
    signed: bool
    zero_point: int = 0

    @property
    def low(self) -> int:
        """Smallest integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Largest integer."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def inverse(self) -> float:
        """``1 / scale`` rounded to float32, the factor that training multiplies with.

        It is infinite where the scale is too small for its reciprocal to fit float32.
        """
        with np.errstate(over="ignore", divide="ignore"):
            return float(np.float32(1.0) / np.float32(self.scale))
