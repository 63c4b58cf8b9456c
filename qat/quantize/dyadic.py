"""Numbers ``integer / 2**shift``, and the widths that keep integer arithmetic exact in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

#: A binary accumulator counts in units of 1/64, so that an integer bias resolves 1/64 of one product.
ACCUMULATOR_UNIT: Final = 64
#: Significant bits of the multiplier of a product of two 8-bit integers: 14 + 10 are exact in float32.
PRODUCT_BITS: Final = 10
#: Bits of the multipliers in a sum of two 8-bit integers: 8 + 14 bits each, their sum is exact in float32.
SUM_BITS: Final = 14
#: Largest shift: onnxruntime's fused operators add the zero point 128 before they round, and 8 integer bits
#: plus 16 fractional ones are what float32 holds exactly.
LARGEST_SHIFT: Final = 16


@dataclass(frozen=True)
class Dyadic:
    """The number ``integer / 2**shift``. Few enough bits make its product with int8 exact in float32."""

    integer: int
    shift: int

    @property
    def value(self) -> float:
        """The number itself; exact in float32, since ``integer`` has at most 14 bits."""
        return float(np.ldexp(float(self.integer), -self.shift))


def dyadic(value: float, bits: int, shift: int | None = None) -> Dyadic:
    """The nearest ``integer / 2**shift`` with an integer of at most ``bits`` bits.

    Args:
        value: not negative, finite.
        bits: of the integer.
        shift: taken if given, else the one that leaves the integer the most bits, up to
            :data:`LARGEST_SHIFT`.
    """
    if shift is None:
        shift = min(bits - (int(np.frexp(value)[1]) if value else 0), LARGEST_SHIFT)
        if round(np.ldexp(value, shift)) >= 2**bits:
            shift -= 1
    return Dyadic(round(np.ldexp(value, shift)), shift)


@dataclass(frozen=True)
class SumMultipliers:
    """Multipliers of both terms of a residual sum, in steps of the result; they share one shift."""

    branch: Dyadic
    residual: Dyadic


def sum_multipliers(branch: float, residual: float) -> SumMultipliers:
    """Dyadic multipliers for two ratios; one shift, from the larger, so that the sum is exact too."""
    shift = dyadic(max(branch, residual), SUM_BITS).shift
    return SumMultipliers(dyadic(branch, SUM_BITS, shift), dyadic(residual, SUM_BITS, shift))
