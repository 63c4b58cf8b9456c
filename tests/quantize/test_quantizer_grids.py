"""Grids of activations and weights: their integers, their scales, and gradients through them."""

from __future__ import annotations

import pytest
import torch

from qat.quantize.activation_quantizers import ActivationQuantizer, FixedQuantizer, fake_quantize_symmetric
from qat.quantize.observers import OBSERVERS, Observer
from qat.quantize.quantizer_base import Quantizer
from qat.quantize.weight_quantizers import WeightQuantizer
from tests.helpers.quantizers import calibrated, noise
from tests.helpers.rounding_bounds import assert_integers

BITS = range(2, 9)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_an_activation_uses_every_integer_of_its_bits(bits: int, signed: bool, observer: Observer) -> None:
    x = torch.linspace(-3, 3, 4001) if signed else torch.linspace(0, 3, 4001)
    point = calibrated(x, bits, signed, observer)
    steps = point(x) / point.scale
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    assert_integers(steps)
    assert steps.round().unique().tolist() == list(range(low, high + 1))
    assert (point.quant_min, point.quant_max) == (low, high)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_an_unsigned_point_has_zero_point_0_even_far_from_0(observer: Observer, shift: float) -> None:
    point = calibrated(
        torch.rand(500, generator=torch.Generator().manual_seed(0)) + shift, 8, False, observer
    )
    assert point.fake.zero_point.item() == 0
    assert point(torch.zeros(1)).item() == 0.0


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_signed_point_is_symmetric_with_zero_point_0(observer: Observer) -> None:
    point = calibrated(noise(500) + 2.0, 8, True, observer)
    assert point.fake.zero_point.item() == 0
    assert point(torch.zeros(1)).item() == 0.0
    x = torch.tensor([0.3, 1.1])
    assert torch.equal(point(-x), -point(x))


@pytest.mark.parametrize("signed", [True, False])
def test_values_outside_the_range_saturate_and_get_no_gradient(signed: bool) -> None:
    point = calibrated(torch.tensor([-1.0, 1.0] if signed else [0.0, 1.0]), 8, signed)
    x = torch.tensor([-5.0, 0.4, 5.0], requires_grad=True)
    out = point(x)
    out.sum().backward()
    steps = (out / point.scale).round().int().tolist()
    assert (steps[0], steps[2]) == (point.quant_min, point.quant_max)
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("count", [500, 50_000])
@pytest.mark.parametrize("bits", BITS)
def test_the_histogram_finds_nearly_the_least_squared_error(bits: int, count: int, signed: bool) -> None:
    """Its search must reckon with the integers that there are, not always with 256 of them."""
    x = noise(count) if signed else noise(count).abs()
    point = calibrated(x, bits, signed, "histogram")
    found = (point(x) - x).square().mean()
    steps = (point.quant_max - point.quant_min) / (2 if signed else 1)
    best = min(
        (torch.fake_quantize_per_tensor_affine(x, clip / steps, 0, point.quant_min, point.quant_max) - x)
        .square()
        .mean()
        for clip in torch.linspace(1, 5, 41).tolist()
    )
    assert found < 1.05 * best


@pytest.mark.parametrize("count", [64, 5000])
def test_steps_and_values_are_each_other_s_inverse_and_agree_with_quantizing(count: int) -> None:
    point = calibrated(noise(count), 5)
    q = torch.arange(point.quant_min, point.quant_max + 1).float()
    assert torch.equal(point.steps(point.values(q)), q)
    assert torch.equal(point.steps(point.values(q).bfloat16()), q)
    assert torch.equal(point.values(q), point.requantize(point.values(q)))
    assert (
        point.values(torch.tensor([1e6, -1e6, 0.5, 1.5])).tolist()
        == (torch.tensor([15.0, -16.0, 0.0, 2.0]) * point.scale).tolist()
    )


def test_steps_of_a_fixed_grid_leave_out_its_zero_point() -> None:
    point = FixedQuantizer(0.5, 3, bits=4)
    x = torch.tensor([-9.0, -1.5, 0.0, 0.2, 0.3, 9.0])
    assert point.steps(x).tolist() == [-3.0, -3.0, 0.0, 0.0, 1.0, 12.0]
    assert torch.equal(point.steps(x) * point.scale, point(x))


def test_a_point_has_a_grid_once_calibrated_and_not_while_calibrating() -> None:
    point = ActivationQuantizer()
    assert (Quantizer().has_grid, FixedQuantizer(1.0, 0).has_grid, point.has_grid) == (False, True, False)
    point = calibrated(noise(8))
    assert point.has_grid
    point.start_calibration()
    assert not point.has_grid


@pytest.mark.parametrize("bits", BITS)
def test_the_integers_of_weights_are_those_that_training_rounds_to_but_for_ties(bits: int) -> None:
    weight = noise(6, 40) * torch.logspace(-2, 2, 6).view(-1, 1)
    quantizer = WeightQuantizer(bits)
    integers, scale = quantizer.integers(weight)
    assert (integers.dtype, scale.dtype) == (torch.float32, torch.float64)
    assert torch.equal(integers, integers.round())
    assert integers.abs().amax(1).tolist() == [2 ** (bits - 1) - 1] * 6
    trained = (quantizer(weight).double() / scale.view(-1, 1)).round()
    assert (trained == integers).double().mean() > 0.99
    assert (trained - integers).abs().max() <= 1


def test_an_all_zero_activation_calibrates_to_a_positive_scale() -> None:
    point = calibrated(torch.zeros(9))
    assert point.scale > 0
    assert torch.equal(point(torch.zeros(9)), torch.zeros(9))


def test_fixed_grids_hold_their_zero_point_and_saturate() -> None:
    point = FixedQuantizer(0.5, 3, bits=4)
    x = torch.tensor([-9.0, -1.5, 0.0, 0.2, 0.3, 9.0])
    assert point(x).tolist() == [-1.5, -1.5, 0.0, 0.0, 0.5, 6.0]
    assert torch.equal(point(x), point.requantize(x))
    assert point.describe() == {"type": "uint4", "scale": 0.5, "zero_point": 3, "range": "fixed"}


@pytest.mark.parametrize("bits", BITS)
def test_a_symmetric_constant_uses_its_signed_integers(bits: int) -> None:
    out = fake_quantize_symmetric(torch.tensor([-1e3, 0.0, 0.3, 1e3]), torch.tensor(0.25), bits)
    assert out.tolist() == [-(2 ** (bits - 1)) / 4, 0.0, 0.25, (2 ** (bits - 1) - 1) / 4]


@pytest.mark.parametrize("bits", BITS)
def test_weights_lie_on_one_symmetric_grid_per_output_channel(bits: int) -> None:
    weight = noise(6, 4, 3, 3) * torch.logspace(-2, 2, 6).view(-1, 1, 1, 1)
    quantizer = WeightQuantizer(bits)
    scale, top = quantizer.scale(weight), 2 ** (bits - 1) - 1
    torch.testing.assert_close(scale, weight.abs().amax((1, 2, 3)) / top)
    steps = quantizer(weight) / scale.view(-1, 1, 1, 1)
    assert_integers(steps)
    assert steps.round().abs().amax((1, 2, 3)).tolist() == [top] * 6


def test_one_channel_does_not_move_the_scale_of_another() -> None:
    weight, quantizer = noise(3, 8), WeightQuantizer()
    before = quantizer.scale(weight)
    weight[1] *= 100
    after = quantizer.scale(weight)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert after[1] > 50 * before[1]


def test_a_row_of_zeros_stays_zero_and_gives_no_nan() -> None:
    weight = noise(3, 8)
    weight[1] = 0.0
    weight.requires_grad_()
    quantizer = WeightQuantizer()
    out = quantizer(weight)
    out.square().sum().backward()
    assert quantizer.scale(weight).gt(0).all()
    assert out[1].eq(0).all()
    assert out.isfinite().all()
    assert weight.grad.isfinite().all()
    assert weight.grad[0].abs().sum() > 0


def test_the_largest_weight_of_a_channel_gets_its_gradient() -> None:
    weight = noise(3, 8).requires_grad_()
    WeightQuantizer(4)(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 8))


def test_weight_quantizers_keep_no_state() -> None:
    quantizer = WeightQuantizer()
    quantizer(noise(3, 8))
    assert quantizer.state_dict() == {}
