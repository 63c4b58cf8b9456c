"""The percentile observer, and limits of ranges; what all observers share is in the tests of quantizers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.quantize.activation_quantizers import ActivationQuantizer
from qat.quantize.observers import MOVING, OBSERVERS, Observer


def calibrated(*batches: Tensor, percentile: float = 99.99, signed: bool = True, bits: int = 8) -> float:
    """The magnitude that the grid spans after these batches."""
    point = ActivationQuantizer(bits, signed, "percentile", percentile=percentile).eval()
    point.start_calibration()
    for batch in batches:
        point(batch)
    point.finish_calibration()
    return float(point.scale) * ((point.quant_max - point.quant_min) / (1 + signed))


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60),
    st.floats(0.1, 100),
    st.booleans(),
)
def test_the_range_ends_at_the_value_of_nearest_rank(
    values: list[float], percentile: float, signed: bool
) -> None:
    """Rank ⌈p·n⌉ of the magnitudes, by a sort of its own."""
    magnitudes = sorted(abs(value) for value in values)
    clip = magnitudes[max(math.ceil(len(values) * (percentile / 100)), 1) - 1]
    x = torch.tensor(values if signed else [abs(value) for value in values])
    found = calibrated(x, percentile=percentile, signed=signed)
    assert found == pytest.approx(clip, rel=1e-5, abs=4e-5)  # no step lies below 2**-23


def test_of_few_values_the_range_is_the_largest() -> None:
    assert calibrated(torch.tensor([0.5, -7.0, 1.0])) == pytest.approx(7.0)


def test_of_many_values_outliers_are_cut() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[:5] = 1000.0
    assert calibrated(x) == pytest.approx(float(np.quantile(x.abs().numpy(), 0.9999)), rel=0.02)
    assert calibrated(x, percentile=100) == pytest.approx(1000.0)


def test_batches_count_alike() -> None:
    batches = [torch.full((9,), value) for value in (1.0, 2.0, 6.0)]
    assert calibrated(*batches) == pytest.approx(3.0)
    assert calibrated(*reversed(batches)) == pytest.approx(3.0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_values_that_are_not_finite_leave_a_point_uncalibrated(value: float) -> None:
    point = ActivationQuantizer(observer="percentile").eval()
    point.start_calibration()
    point(torch.tensor([1.0, value, 2.0]))
    point.finish_calibration()
    assert not point.calibrated


def test_an_empty_batch_counts_for_nothing() -> None:
    assert calibrated(torch.ones(3), torch.ones(0)) == pytest.approx(1.0)


@pytest.mark.parametrize("observer", [name for name in OBSERVERS if name not in MOVING])
def test_observers_that_clip_observe_during_calibration_only(observer: Observer) -> None:
    point = ActivationQuantizer(observer=observer)
    point.start_calibration()
    point(torch.ones(64))
    point.finish_calibration()
    scale = point.scale.clone()
    point.train()(100 * torch.ones(64))
    assert torch.equal(point.scale, scale)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("signed", [True, False])
def test_a_limit_bounds_the_range_and_never_widens_it(observer: Observer, signed: bool) -> None:
    x = torch.linspace(0, 8, 500)

    def span(clip: float | None) -> float:
        point = ActivationQuantizer(4, signed, observer, clip=clip).eval()
        point.start_calibration()
        point(x)
        point.finish_calibration()
        return float(point.scale) * (7.5 if signed else 15)

    assert span(2.0) == pytest.approx(2.0)
    assert span(50.0) == span(None)


def test_a_limit_holds_while_training_too() -> None:
    point = ActivationQuantizer(observer="minmax", clip=3.0).train()
    point(100 * torch.ones(4))
    assert float(point.scale) * 127.5 == pytest.approx(3.0)
