"""Calibration: what it shows the observers, what it leaves alone, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qat.errors import QuantizationError
from qat.models.bnext import BNext
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.calibration import calibrate
from qat.quantize.preparation import prepare
from qat.recipe.schema import Quantization, StemGroup, TrunkGroup
from tests.helpers.prepared_networks import OFF


@pytest.mark.parametrize(
    "quantization", [None, Quantization(**OFF), Quantization(**{**OFF, "stem": StemGroup()})]
)
def test_calibration_without_a_quantized_activation_is_refused(
    float_toy: BNext, images: Tensor, quantization: Quantization | None
) -> None:
    if quantization:
        prepare(float_toy, quantization)
    with pytest.raises(QuantizationError, match="nothing to calibrate"):
        calibrate(float_toy, lambda: float_toy(images))


def test_calibration_that_reaches_no_point_is_refused(float_toy: BNext) -> None:
    prepare(float_toy, Quantization())
    with pytest.raises(QuantizationError, match=r"no finite value at feature\.0\.trunk"):
        calibrate(float_toy, lambda: None)


@pytest.mark.parametrize("observer", ["moving_average", "minmax", "histogram", "percentile"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_with_the_first_point(
    float_toy: BNext, images: Tensor, observer: Any, value: float
) -> None:
    prepare(float_toy, Quantization(trunk=TrunkGroup(observer=observer)))
    with torch.no_grad():
        float_toy.feature[1].FFN.norm2.running_mean[0] = value
    point = r"feature\.1\.FFN\.branch: the activations there are not finite"
    with pytest.raises(QuantizationError, match=point):
        calibrate(float_toy, lambda: float_toy(images))
    float_toy(images)  # the check is for calibration alone


@pytest.mark.parametrize("training", [True, False])
def test_calibration_evaluates_without_gradients_and_restores_the_mode(
    float_toy: BNext, images: Tensor, training: bool
) -> None:
    prepare(float_toy.train(training), Quantization())
    norm = float_toy.feature[1].FFN.norm1
    before = norm.running_mean.clone()
    modes = []

    def forward() -> None:
        modes.append((float_toy.training, float_toy(images).requires_grad))

    calibrate(float_toy, forward)
    assert modes == [(False, False)]
    assert float_toy.training is training
    assert torch.equal(norm.running_mean, before)


def test_a_calibration_that_fails_leaves_no_point_observing(float_toy: BNext) -> None:
    prepare(float_toy.train(), Quantization())

    def forward() -> None:
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        calibrate(float_toy, forward)
    assert float_toy.training
    assert not any(point.calibrating for _, point in activation_quantizers(float_toy))


def test_calibration_shows_float_ranges(float_toy: BNext, images: Tensor) -> None:
    with torch.no_grad():
        stem = float_toy.feature[0](images)
    prepare(float_toy, Quantization(stem=StemGroup(enabled=False), trunk=TrunkGroup(observer="minmax")))
    calibrate(float_toy, lambda: float_toy(images))
    assert float_toy.feature[0].trunk.scale.item() == pytest.approx(stem.abs().max().item() / 127.5, rel=1e-5)
