"""Integer arithmetic on float tensors, against exact fractions and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qat_export.integer.network import Slopes
from qat_export.integer.reference import mean_in_steps, prelu, requantize
from torch import Tensor

from qat.grid import Grid
from qat.quantize.dyadic import LARGEST_SHIFT
from qat.quantize.integers import (
    SMALLEST_MULTIPLIER,
    Requantization,
    mean_steps,
    prelu_steps,
    requantization,
    saturate,
    sigmoid_table,
    snap_up,
)

INT8 = Grid(1.0, 8, signed=True)
POSITIVE = st.floats(2.0**-13, 2.0**13, width=32)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Requantization.


@settings(max_examples=200)
@given(
    gain=st.floats(0, 1e6) | st.floats(0, 1e-5),
    offset=st.floats(-1e12, 1e12) | st.floats(-300, 300),
    reach=st.sampled_from([1, 576, 294_912, 1_179_648]),
)
def test_a_requantized_accumulator_misses_its_affine_function_by_less_than_a_unit_of_the_bias(
    gain: float, offset: float, reach: int
) -> None:
    rule = requantization(double(gain), double(offset), reach)
    assert (rule.multiplier.dtype, rule.bias.dtype) == (torch.float32, torch.float64)
    factor, bias = rule.multiplier.item(), rule.bias.item()
    assert factor > 0
    assert bias == int(bias)
    assert abs(bias) + reach < 2**31
    assert rule.constant.item() is (gain < SMALLEST_MULTIPLIER)
    for accumulator in (-reach, -1, 0, 1, reach):
        found = (accumulator + bias) * factor
        wanted = gain * accumulator + offset
        if gain < SMALLEST_MULTIPLIER:
            assert abs(np.clip(found, -300, 300) - np.clip(wanted, -300, 300)) <= 1.0
            continue
        # Offsets are cut where every result is saturated anyway.
        cut = np.clip(offset, -300 - reach * gain, 300 + reach * gain)
        allowed = 0.5 * factor + 1e-6 * (reach * gain + abs(cut))
        assert abs(found - (gain * accumulator + cut)) <= allowed
        if abs(cut) < abs(offset):
            assert abs(found) >= 300 - allowed
            assert found * offset >= 0 or allowed > 300


def test_a_gain_of_zero_gives_the_rounded_offset_of_its_channel_alone() -> None:
    rule = requantization(double(0.0, SMALLEST_MULTIPLIER / 2, 0.5), double(2.6, -3.4, 1.0), 100)
    assert rule.constant.tolist() == [True, True, False]
    assert (rule.bias * rule.multiplier.double()).tolist() == [3.0, -3.0, 1.0]
    assert rule.bias[2] == 2
    assert rule(torch.zeros(1, 3, 1, 1)).flatten().tolist() == [3.0, -3.0, 1.0]


@given(st.integers(-(2**29), 2**29), st.integers(-(2**29), 2**29), st.floats(2.0**-22, 4.0, width=32))
def test_applying_it_equals_the_specification_also_beyond_2_to_the_24(
    accumulator: int, bias: int, multiplier: float
) -> None:
    rule = Requantization(torch.tensor([multiplier]), double(bias), torch.tensor([False]))
    found = saturate(rule(torch.tensor([[accumulator]], dtype=torch.float64)), -128, 127)
    factor = np.array([multiplier], np.float32)
    expected = requantize(np.array([[accumulator]]), np.array([bias], np.int32), factor, INT8)
    assert found.item() == expected.item()
    # The sum is rounded to float32 once, then the product once.
    assert rule(double(accumulator)[:, None]).item() == float(np.float32(accumulator + bias) * factor[0])


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)])
def test_each_channel_has_its_own_bias_and_multiplier(shape: tuple[int, ...]) -> None:
    rule = Requantization(torch.tensor([1.0, 0.5, 2.0]), double(0, 4, -1), torch.zeros(3, dtype=torch.bool))
    found = rule(torch.full(shape, 10.0))
    assert found.dtype == torch.float32
    assert [found[:, channel].unique().tolist() for channel in range(3)] == [[10.0], [7.0], [18.0]]


def test_an_accumulator_with_a_gradient_requantizes_without_a_warning() -> None:
    rule = requantization(double(0.5), double(1.0), 10)
    assert rule(torch.ones(1, 1, 1, 1, requires_grad=True)).item() == 1.5


# Rounding, PReLU, means, the sigmoid.


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (1e9, 127), (-1e9, -128)]
)
def test_rounding_is_half_to_even_and_saturates(value: float, expected: int) -> None:
    assert saturate(torch.tensor([value]), -128, 127).item() == expected


def test_saturating_leaves_its_argument_alone() -> None:
    x = torch.tensor([0.4, 900.0])
    saturate(x, -1, 1)
    assert x.tolist() == pytest.approx([0.4, 900.0])


@pytest.mark.parametrize("shift", [-3, 0, 7, 14])
def test_prelu_equals_the_specification_for_every_integer(shift: int) -> None:
    integers = np.array([-128, -1, 0, 1, 77, 127], np.int8)
    q = np.broadcast_to(np.arange(-128, 128, dtype=np.int16), (1, len(integers), 1, 256))
    slopes = torch.from_numpy(np.ldexp(integers.astype(np.float32), -shift))
    found = prelu_steps(torch.from_numpy(q.astype(np.float32)), slopes, -128, 127)
    np.testing.assert_array_equal(found.numpy(), prelu(q, Slopes(integers, shift), INT8))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 6), (33, 31)])
def test_a_mean_is_one_float32_product_of_the_exact_sum(height: int, width: int) -> None:
    rng = np.random.default_rng(height)
    q = rng.integers(-128, 128, (2, 5, height, width)).astype(np.int16)
    multiplier = rng.uniform(0, 3, 5).astype(np.float32)
    found = mean_steps(torch.from_numpy(q).float(), torch.from_numpy(multiplier))
    assert (found.shape, found.dtype) == ((2, 5, 1, 1), torch.float32)
    np.testing.assert_array_equal(found[:, :, 0, 0].numpy(), mean_in_steps(q, multiplier))
    exact = q.astype(np.float64).mean((2, 3)) * multiplier
    np.testing.assert_allclose(found[:, :, 0, 0].numpy(), exact, rtol=3e-7, atol=1e-30)


@pytest.mark.parametrize("levels", [3, 15, 255])
@pytest.mark.parametrize("scale", [1e-6, 0.05, 10.0, 1e4])
def test_the_sigmoid_s_table_is_its_formula_for_every_logit(scale: float, levels: int) -> None:
    table = sigmoid_table(scale, levels)
    assert (table.shape, table.dtype) == ((256,), torch.float32)
    for q in range(-128, 128):
        z = q * scale
        share = 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
        assert table[q + 128].item() == round(levels * share)


# Numbers of few bits.


def significant_bits(value: float) -> int:
    mantissa = int(math.frexp(value)[0] * 2**53)
    return mantissa.bit_length() - (mantissa & -mantissa).bit_length() + 1


@given(POSITIVE)
def test_a_snapped_ratio_has_at_most_ten_bits_and_is_raised_a_little(value: float) -> None:
    ratio = torch.tensor(value)
    snapped = snap_up(ratio)
    assert significant_bits(snapped.item()) <= 10
    # By 10 bits, or by one unit of the largest shift where the ratio is tiny.
    assert ratio <= snapped <= ratio * (1 + 2**-9) + 2.0**-LARGEST_SHIFT
    assert torch.equal(snap_up(snapped), snapped)


@given(POSITIVE, st.integers(-128, 127), st.integers(-128, 127))
def test_a_product_of_8_bit_integers_times_a_snapped_ratio_is_exact_in_float32(
    value: float, left: int, right: int
) -> None:
    multiplier = snap_up(torch.tensor(value))
    found = torch.tensor(float(left)) * torch.tensor(float(right)) * multiplier
    assert found.item() == left * right * multiplier.item()


def test_without_snapping_such_products_are_rounded() -> None:
    multiplier = torch.tensor(1 / 3)
    assert (torch.tensor(127.0 * 125.0) * multiplier).item() != 127 * 125 * multiplier.item()
