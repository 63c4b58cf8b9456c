"""Numbers ``integer / 2**shift``: their bits, their error, and that float32 holds what they make."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.quantize.dyadic import LARGEST_SHIFT, PRODUCT_BITS, SUM_BITS, Dyadic, dyadic, sum_multipliers

RATIO = st.floats(1e-12, 1e12)


def exact(number: Dyadic) -> Fraction:
    return Fraction(number.integer) / Fraction(2) ** number.shift


@pytest.mark.parametrize(
    ("integer", "shift"), [(0, 0), (1, 149), (16383, 14), (-5, 3), (1023, -10), (8191, 60)]
)
def test_the_value_of_a_dyadic_number_is_exact_in_float32(integer: int, shift: int) -> None:
    number = Dyadic(integer, shift)
    assert Fraction(number.value) == exact(number)
    assert float(np.float32(number.value)) == number.value


@given(st.floats(1e-25, 1e25), st.sampled_from([8, 10, 14]))
def test_a_dyadic_multiplier_has_the_bits_asked_for_and_half_a_unit_of_error(value: float, bits: int) -> None:
    found = dyadic(value, bits)
    assert found.integer < 2**bits
    assert found.integer >= 2 ** (bits - 1) or found.shift == LARGEST_SHIFT
    # Rounding up to the next power of two costs a bit, and half of the coarser unit.
    assert abs(exact(found) - Fraction(value)) <= Fraction(1, 2) / Fraction(2) ** found.shift
    assert Fraction(found.value) == exact(found)


@given(st.integers(512, 1023), st.integers(-20, LARGEST_SHIFT))
def test_a_number_that_fits_is_kept_exactly(integer: int, shift: int) -> None:
    found = dyadic(float(np.ldexp(integer, -shift)), 10)
    assert exact(found) == Fraction(integer) / Fraction(2) ** shift


@pytest.mark.parametrize("value", [1023.5, 1023.75, 2.0**-16 * 1023.6])
def test_a_number_that_rounds_up_to_a_power_of_two_keeps_to_its_bits(value: float) -> None:
    found = dyadic(value, 10)
    assert found.integer == 512
    assert found.value == pytest.approx(value, rel=1e-3)


def test_zero_and_a_value_far_below_a_given_shift_become_zero() -> None:
    assert dyadic(0.0, 10).value == 0
    assert dyadic(1e-9, 14, 14).integer == 0


@given(RATIO, RATIO)
def test_both_multipliers_of_a_sum_share_the_shift_of_the_larger(branch: float, residual: float) -> None:
    found = sum_multipliers(branch, residual)
    assert found.branch.shift == found.residual.shift == dyadic(max(branch, residual), SUM_BITS).shift
    for number, value in ((found.branch, branch), (found.residual, residual)):
        assert 0 <= number.integer < 2**SUM_BITS
        assert abs(exact(number) - Fraction(value)) <= Fraction(1, 2) / Fraction(2) ** number.shift


@given(RATIO, RATIO, st.integers(-128, 127), st.integers(-128, 127))
def test_a_residual_sum_is_exact_in_float32(branch: float, residual: float, b: int, r: int) -> None:
    found = sum_multipliers(branch, residual)
    f32 = np.float32
    total = f32(b) * f32(found.branch.value) + f32(r) * f32(found.residual.value)
    assert Fraction(float(total)) == b * exact(found.branch) + r * exact(found.residual)


@given(RATIO, st.integers(-128, 127), st.integers(-128, 127))
def test_a_product_of_two_8_bit_integers_is_exact_in_float32_in_any_order(
    value: float, a: int, b: int
) -> None:
    found = dyadic(value, PRODUCT_BITS)
    x, y, multiplier = np.float32(a), np.float32(b), np.float32(found.value)
    results = {float((x * y) * multiplier), float(x * (y * multiplier)), float((x * multiplier) * y)}
    assert {Fraction(result) for result in results} == {a * b * exact(found)}
