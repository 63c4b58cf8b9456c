"""Activation quantizers: uncalibrated, observing, frozen, and the ranges they take."""

from __future__ import annotations

import pytest
import torch

from qat.quantize.activation_quantizers import ActivationQuantizer
from qat.quantize.calibration import freeze_observers
from qat.quantize.observers import OBSERVERS, Observer
from qat.quantize.quantizer_base import Quantizer
from tests.helpers.quantizers import calibrated, noise, same_state, state_of


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
