"""A grid of integers: what quantization, the integer network and the native library mean by one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grid:
    """Integers of one tensor: ``value = scale * (q - zero_point)``, ``bits`` wide."""

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
        """``1 / scale`` rounded to float32, which is what training multiplies with."""
        with np.errstate(over="ignore", divide="ignore"):  # of a step too small it is infinite
            return float(np.float32(1.0) / np.float32(self.scale))
