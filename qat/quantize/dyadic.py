"""Dyadic numbers ``integer / 2**shift``, with so few bits that products with them are exact in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

#: What one product of ±1 adds to the accumulator of a binary convolution. The accumulator counts in units of
#: 1/64 product, so that an integer bias has that resolution.
ACCUMULATOR_UNIT: Final = 64
#: Bits of a multiplier of a product of two 8-bit integers. The product's magnitude has at most 14 bits, and
#: float32 holds 14 + 10 = 24 bits exactly.
PRODUCT_BITS: Final = 10
#: Bits of the two multipliers in a sum of two 8-bit integers: each product has at most 8 + 14 = 22 bits, and
#: their sum fits the 24 bits of float32.
SUM_BITS: Final = 14
#: Largest shift. onnxruntime's fused operators add the zero point 128 before they round; the result has 8
#: bits before and 16 bits after the binary point, the 24 bits that float32 holds exactly.
LARGEST_SHIFT: Final = 16


@dataclass(frozen=True)
class Dyadic:
    """The number ``integer / 2**shift``. Its product with an int8 is exact in float32."""

    integer: int
    shift: int

    @property
    def value(self) -> float:
        """The number itself; exact in float32, since ``integer`` has at most 14 bits."""
        return float(np.ldexp(float(self.integer), -self.shift))


def dyadic(value: float, bits: int, shift: int | None = None) -> Dyadic:
    """The number ``integer / 2**shift`` nearest to ``value`` with an integer of at most ``bits`` bits.

    Args:
        value: finite, not negative.
        bits: most bits of the integer.
        shift: the shift to use; ``None`` takes the largest, up to :data:`LARGEST_SHIFT`, at which the integer
            has at most ``bits`` bits.
    """
    if shift is None:
        shift = min(bits - (int(np.frexp(value)[1]) if value else 0), LARGEST_SHIFT)
        if round(np.ldexp(value, shift)) >= 2**bits:
            shift -= 1
    return Dyadic(round(np.ldexp(value, shift)), shift)


@dataclass(frozen=True)
class SumMultipliers:
    """Multipliers of both terms of a residual sum, from their steps to those of the sum; of equal shifts."""

    branch: Dyadic
    residual: Dyadic


def sum_multipliers(branch: float, residual: float) -> SumMultipliers:
    """Dyadic multipliers nearest to two ratios of scales, with the shift that the larger one needs.

    With equal shifts the sum of both products is exact in float32 too.
    """
    shift = dyadic(max(branch, residual), SUM_BITS).shift
    return SumMultipliers(dyadic(branch, SUM_BITS, shift), dyadic(residual, SUM_BITS, shift))
