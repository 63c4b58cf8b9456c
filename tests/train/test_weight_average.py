"""The exponential moving average of weights: what is averaged, and what is copied."""

from __future__ import annotations

import copy

import pytest
import torch

from qat.models.bnext import BNext, is_binary, set_temperature
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.calibration import calibrate, freeze_observers
from qat.quantize.preparation import prepare
from qat.recipe.schema import Quantization
from qat.train.weight_average import ExponentialMovingAverage


def toy() -> BNext:
    torch.manual_seed(0)
    return BNext(10, widths=[8, 8, 16])


def test_the_average_follows_its_formula_and_the_model_stays_as_it_is() -> None:
    model = toy()
    average = ExponentialMovingAverage(model, 0.9)
    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    for step in range(1, 200):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value))
        before = copy.deepcopy(model.state_dict())
        average.update(model, step)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
    for name, value in average.network.named_parameters():
        assert torch.allclose(value, expected[name], atol=1e-4), name
        assert not value.requires_grad


def test_early_steps_weigh_more_so_that_the_start_is_forgotten() -> None:
    model = toy()
    average = ExponentialMovingAverage(model, 0.9999)
    start = model.fc.weight.detach().clone()
    with torch.no_grad():
        model.fc.weight.add_(1.0)
    average.update(model, 1)
    moved = (dict(average.network.named_parameters())["fc.weight"] - start).mean()
    assert float(moved) == pytest.approx(9 / 11, abs=1e-5)


def test_buffers_are_taken_over_and_the_average_is_binary_when_the_network_is() -> None:
    model = toy().train()
    average = ExponentialMovingAverage(model, 0.99)
    model(torch.randn(4, 3, 8, 8))
    set_temperature(model, 1e-8)
    assert not is_binary(average.network)
    average.update(model, 1)
    assert is_binary(average.network)
    theirs = dict(model.named_buffers())
    assert all(torch.equal(value, theirs[name]) for name, value in average.network.named_buffers())


def test_quantizers_are_followed_with_what_they_have_seen() -> None:
    model = toy()
    prepare(model, Quantization())
    average = ExponentialMovingAverage(model, 0.99)
    images = torch.randn(4, 3, 8, 8)
    calibrate(model, lambda: model(images))
    freeze_observers(model)
    average.follow(model)
    model.eval(), average.network.eval()
    assert all(p.calibrated and not p.observing for _, p in activation_quantizers(average.network))
    assert torch.equal(average.network(images), model(images))
