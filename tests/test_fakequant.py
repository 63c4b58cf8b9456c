from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rounding_bounds import assert_integers
from torch import Tensor

from qat.bnext import BNext
from qat.fakequant import (
    ActivationQuantizer,
    FixedQuantizer,
    Quantizer,
    WeightQuantizer,
    activation_quantizers,
    fake_quantize_symmetric,
    freeze_observers,
)
from qat.observers import OBSERVERS, Observer
from qat.prepare import quantization_map

BITS = range(2, 9)


def calibrated(
    x: Tensor, bits: int = 8, signed: bool = True, observer: Observer = "minmax"
) -> ActivationQuantizer:
    """A quantizer that saw ``x``, in evaluation mode."""
    point = ActivationQuantizer(bits, signed, observer).eval()
    point.start_calibration()
    point(x)
    point.finish_calibration()
    return point


def state_of(point: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in point.state_dict().items()}


def same_state(point: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    after = point.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- states of an activation quantizer -----------------------------------------------------------------


def test_a_point_left_in_float_changes_nothing() -> None:
    x, point = noise(5), Quantizer()
    assert point(x) is x
    assert point.requantize(x) is x
    assert point.state_dict() == {}
    assert point.describe() == {"type": "float"}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_an_uncalibrated_point_passes_values_through_in_evaluation(observer: Observer) -> None:
    point, x = ActivationQuantizer(observer=observer).eval(), noise(64)
    before = state_of(point)
    assert torch.equal(point(x), x)
    assert torch.equal(point.requantize(x), x)
    assert same_state(point, before)
    assert point.describe()["scale"] is None


@pytest.mark.parametrize("observer", OBSERVERS)
def test_calibration_observes_without_quantizing(observer: Observer) -> None:
    point, x = ActivationQuantizer(bits=2, observer=observer).eval(), noise(256)
    before = state_of(point)
    point.start_calibration()
    assert torch.equal(point(x), x)
    assert not same_state(point, before)
    point.finish_calibration()
    assert point.calibrated
    assert not torch.equal(point(x), x)


def test_calibrating_again_shows_float_values_once_more() -> None:
    x = noise(64)
    point = calibrated(x, bits=3)
    point.start_calibration()
    assert torch.equal(point(x), x)
    assert torch.equal(point.requantize(x), x)


def test_a_point_that_saw_nothing_stays_uncalibrated() -> None:
    point = ActivationQuantizer().eval()
    point.start_calibration()
    point.finish_calibration()
    assert not point.calibrated
    assert torch.equal(point(torch.tensor([0.123])), torch.tensor([0.123]))


@pytest.mark.parametrize("observer", OBSERVERS)
def test_evaluation_never_observes(observer: Observer) -> None:
    point = calibrated(noise(256), observer=observer)
    before = state_of(point)
    point(100 * noise(256))
    assert same_state(point, before)


@pytest.mark.parametrize("observer", ["moving_average", "minmax"])
def test_training_widens_the_range_until_frozen(observer: Observer) -> None:
    point = calibrated(noise(256), observer=observer).train()
    scale = point.scale.clone()
    point(100 * noise(256))
    assert point.scale > scale
    freeze_observers(point)
    before = state_of(point)
    point(10_000 * noise(256))
    assert same_state(point, before)


def test_the_moving_average_moves_by_its_constant() -> None:
    point = ActivationQuantizer(averaging=0.25).train()
    point(torch.tensor([-1.0, 1.0]))
    point(torch.tensor([-9.0, 9.0]))
    assert point.scale.item() == pytest.approx(3.0 / 127.5)


def test_the_histogram_observes_during_calibration_only() -> None:
    point = ActivationQuantizer(observer="histogram").train()
    before = state_of(point)
    x = noise(64)
    with pytest.warns(UserWarning, match="stay float: 'histogram' looks at values in calibration alone"):
        assert torch.equal(point(x), x)
    assert same_state(point, before)
    point.start_calibration()
    point(x)
    point.finish_calibration()
    before = state_of(point)
    point(50 * x)
    assert same_state(point, before)
    assert not torch.equal(point(x), x)


def test_training_an_uncalibrated_point_starts_its_grid() -> None:
    point = ActivationQuantizer(observer="minmax").train()
    point(torch.tensor([-2.0, 2.0]))
    assert point.calibrated
    assert point.scale.item() == pytest.approx(2 / 127.5)


def test_the_range_can_be_looked_at_elsewhere() -> None:
    point = ActivationQuantizer(observer="minmax").eval()
    point.start_calibration()
    point(torch.tensor([1.0]), torch.tensor([51.0]))
    point.finish_calibration()
    assert point.scale.item() == pytest.approx(51 / 127.5)


@pytest.mark.parametrize("observer", ["moving_average", "minmax"])
def test_requantizing_never_observes(observer: Observer) -> None:
    point = calibrated(noise(64), observer=observer).train()
    before = state_of(point)
    point.requantize(100 * noise(64))
    assert same_state(point, before)


# --- grids ---------------------------------------------------------------------------------------------


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


# --- weights -------------------------------------------------------------------------------------------


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


# --- state dicts, types, copies ------------------------------------------------------------------------


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("signed", [True, False])
def test_a_state_dict_restores_the_grid_and_that_it_is_calibrated(observer: Observer, signed: bool) -> None:
    x = noise(300) if signed else noise(300).abs()
    point = calibrated(x, 5, signed, observer)
    twin = ActivationQuantizer(5, signed, observer).eval()
    assert not torch.equal(twin(x), point(x))
    twin.load_state_dict(point.state_dict())
    assert twin.calibrated
    assert torch.equal(twin(x), point(x))


def test_an_uncalibrated_state_dict_makes_a_point_uncalibrated() -> None:
    point = calibrated(noise(64))
    point.load_state_dict(ActivationQuantizer().state_dict())
    assert not point.calibrated


def test_a_state_without_any_key_of_a_point_leaves_it_as_it_is() -> None:
    point = calibrated(noise(64))
    before = state_of(point)
    point.load_state_dict({}, strict=True)
    assert same_state(point, before)
    assert point.calibrated
    fixed = FixedQuantizer(0.5, 3)
    fixed.load_state_dict({}, strict=True)
    assert fixed.scale.item() == 0.5


@pytest.mark.parametrize("make", [lambda: calibrated(noise(64)), lambda: FixedQuantizer(0.5, 3)])
def test_a_state_with_some_keys_of_a_point_is_refused(make: Any) -> None:
    point = make()
    # torch takes eps, a constant of its observers, as optional in every state dict.
    for key in [key for key in point.state_dict() if not key.endswith(".eps")]:
        partial = {other: value for other, value in point.state_dict().items() if other != key}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            make().load_state_dict(partial)
        make().load_state_dict({**partial, key: point.state_dict()[key]})


def test_a_network_refuses_a_partial_set_of_quantizer_keys(toy: BNext) -> None:
    state = toy.state_dict()
    toy.load_state_dict(state)
    del state["feature.1.FFN.y.fake.scale"]
    with pytest.raises(RuntimeError, match=r"feature\.1\.FFN\.y\.fake\.scale"):
        toy.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moving_to_another_type_keeps_the_grid_in_float32_to_the_bit(dtype: torch.dtype) -> None:
    point, fixed = calibrated(noise(64)), FixedQuantizer(1 / 255, 17)
    before, fixed_before = state_of(point), state_of(fixed)
    point.to(dtype)
    fixed.to(dtype)
    assert point.scale.dtype == fixed.scale.dtype == torch.float32
    assert {key: value.dtype for key, value in before.items()} == {
        key: value.dtype for key, value in point.state_dict().items()
    }
    assert same_state(point, before)
    assert same_state(fixed, fixed_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_quantizers_return_the_type_they_are_given(dtype: torch.dtype) -> None:
    x = noise(4, 4).to(dtype)
    assert calibrated(noise(64))(x).dtype == dtype
    assert FixedQuantizer(0.1, 3)(x).dtype == dtype
    assert WeightQuantizer()(x).dtype == dtype


def test_a_copied_network_shares_no_grid_with_its_original(toy: BNext, images: Tensor) -> None:
    twin = copy.deepcopy(toy)
    points, copies = dict(activation_quantizers(toy)), dict(activation_quantizers(twin))
    assert points.keys() == copies.keys()
    assert not {id(point) for point in points.values()} & {id(point) for point in copies.values()}
    own = {id(point) for point in copies.values()}
    sources = [module.source.quantizer for module in twin.modules() if hasattr(module, "source")]
    assert len(sources) == 2 + 4 * 3 - 2  # the head's PReLU and pooling, each sub-block of four blocks
    assert {id(source) for source in sources} <= own

    before = toy(images)
    assert torch.equal(twin(images), before)
    for point in copies.values():
        point.fake.scale.mul_(3.0)
    assert torch.equal(toy(images), before)
    assert not torch.equal(twin(images), before)


def test_the_quantizers_of_a_network_are_listed_by_name(toy: BNext) -> None:
    names = [name for name, _ in activation_quantizers(toy)]
    assert len(names) == len(set(names))
    assert {"feature.0.trunk", "feature.2.Attention.product", "feature.4.trunk_out", "fc.input"} <= set(names)
    assert set(names) < quantization_map(toy).keys()


def test_freezing_a_network_fixes_every_grid_in_training(toy: BNext, images: Tensor) -> None:
    twin = copy.deepcopy(toy)
    freeze_observers(toy)
    before = {name: state_of(point) for name, point in activation_quantizers(toy)}
    for model in (toy, twin):
        model.train()(5 * images)
    assert all(same_state(point, before[name]) for name, point in activation_quantizers(toy))
    assert not all(same_state(point, before[name]) for name, point in activation_quantizers(twin))
