"""Learned scales: equal results where scales are equal, gradients, and what is kept and frozen."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.rounding_bounds import assert_within, gamma, sum_bound

pytest.importorskip("brevitas")

from qat.quantize.activation_quantizers import ActivationQuantizer
from qat.quantize.calibration import freeze_observers
from qat.quantize.learned_scales import (
    LearnedActivationQuantizer,
    LearnedWeightQuantizer,
    learned_step,
    quantize,
)
from qat.quantize.observers import OBSERVERS, Observer
from qat.quantize.weight_quantizers import WeightQuantizer
from qat.recipe.schema import Optimizer
from qat.train.optimizer import make_optimizer

BITS = range(2, 9)


def calibrated(kind: type[ActivationQuantizer], x: Tensor, *args: Any, **options: Any) -> Any:
    point = kind(*args, **options).eval()
    point.start_calibration()
    point(x)
    point.finish_calibration()
    return point


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained_weights(bits: int, weight: Tensor, **options: Any) -> LearnedWeightQuantizer:
    """A quantizer in training mode that has stored its ranges."""
    quantizer = LearnedWeightQuantizer(bits, rows=[len(weight)], **options).train()
    quantizer(weight)
    return quantizer


def assert_gradients_alike(learned: Tensor, observed: Tensor) -> None:
    """A bound on the error of gradients, which with learned scales are multiplied by s · (1 / s)."""
    assert_within(learned, observed, gamma(3, torch.float32) * observed.double().abs())


# Equality with torch_ao.


@given(
    st.integers(2, 16),
    st.booleans(),
    st.floats(2.0**-20, 2.0**10, width=32),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_both_backends_round_alike_with_equal_scales(
    bits: int, signed: bool, scale: float, shape: list[int], seed: int, dtype: torch.dtype
) -> None:
    """For values on the grid, at ties, just beside ties, and beyond the range; and for their gradients."""
    observed, learned = ActivationQuantizer(bits, signed), LearnedActivationQuantizer(bits, signed)
    for point in (observed, learned):
        point.fake.scale.fill_(scale)
        point.calibrated, point.observing = True, False
    assert torch.equal(observed.scale, learned.scale)
    random = torch.Generator().manual_seed(seed)
    reach = 2 ** (bits - 1)
    halves = torch.randint(-3 * reach, 3 * reach + 1, shape, generator=random).double() / 2
    hair = torch.randint(-1, 2, shape, generator=random).double() * 2.0**-22
    x = (halves * (1 + hair) * scale).to(dtype)
    one, two = (x.clone().requires_grad_() for _ in range(2))
    out, expected = learned(two), observed(one)
    assert out.dtype == expected.dtype == dtype
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    # torch passes the gradient of values that round to the last integer, the paper only of those within it.
    v = x.double() / scale
    inner = (v > learned.quant_min + 0.01) & (v < learned.quant_max - 0.01)
    outer = (v < learned.quant_min - 0.51) | (v > learned.quant_max + 0.51)
    assert_gradients_alike(two.grad[inner | outer], one.grad[inner | outer])
    assert torch.equal(learned.steps(x), observed.steps(x))
    assert torch.equal(learned.values(halves), observed.values(halves))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(6, 40), (5, 3, 3, 3), (1, 1)])
def test_weights_quantize_alike_until_scales_are_trained(
    bits: int, power_of_two: bool, shape: tuple[int, ...]
) -> None:
    weight = noise(*shape) * torch.logspace(-2, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight[-1].zero_()
    observed, learned = (
        WeightQuantizer(bits, power_of_two),
        LearnedWeightQuantizer(bits, power_of_two, [shape[0]]),
    )
    for mode in (False, True):  # in training the ranges are kept
        learned.train(mode)
        one, two = (weight.clone().requires_grad_() for _ in range(2))
        expected, out = observed(one), learned(two)
        assert torch.equal(out, expected)
        assert torch.equal(learned.scale(weight), observed.scale(weight))
        assert all(
            torch.equal(a, b)
            for a, b in zip(learned.integers(weight), observed.integers(weight), strict=True)
        )
        expected.sum().backward()
        out.sum().backward()
        inner = weight.abs() < 0.999 * weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1))
        assert_gradients_alike(two.grad[inner], one.grad[inner])


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_calibration_starts_a_learned_scale_where_the_observer_ends(
    observer: Observer, signed: bool, power_of_two: bool
) -> None:
    x = noise(500) if signed else noise(500).abs()
    kinds = (ActivationQuantizer, LearnedActivationQuantizer)
    one, two = (calibrated(kind, x, 5, signed, observer, power_of_two=power_of_two) for kind in kinds)
    assert torch.equal(one.scale, two.scale)
    assert torch.equal(one(x), two(x))
    assert two.describe() == {**one.describe(), "range": "learned"}


# Gradients.


@pytest.mark.parametrize("signed", [True, False])
def test_the_gradient_of_a_scale_is_that_of_the_paper(signed: bool) -> None:
    """Esser et al. 2020, equations 3 and 5, summed over the values and times ``1 / √(N · Qp)``."""
    bits, scale = 4, 0.3
    low, high = (-8, 7) if signed else (0, 15)
    x = 2 * noise(3, 50)
    upstream = noise(3, 50, seed=1)
    step = torch.tensor([scale], requires_grad=True)
    (quantize(x, step.clone(), bits, signed=signed, shared=50) * upstream).sum().backward()
    v = x.double() / step.detach().double()
    assert step.grad is not None
    exact, bound = gradient_of_scale(v, upstream, low, high)
    assert_within(step.grad, (exact / math.sqrt(50 * high)).view(1), bound / math.sqrt(50 * high))


def gradient_of_scale(v: Tensor, upstream: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Sum over ``upstream`` times the derivative of ``s round(v)`` by s, and a bound on its error in float32.

    Within the range the derivative is a difference from v, which is a product with a rounded reciprocal.
    Beside products and their sum there are the square root and what it divides.
    """
    inside = (v > low) & (v < high)
    derivative = torch.where(inside, v.round() - v, v.clamp(low, high))
    magnitudes = torch.where(inside, v.round().abs() + v.abs(), v.clamp(low, high).abs())
    bound = sum_bound((magnitudes * upstream.abs()).sum(), upstream.numel() + 8, torch.float32)
    return (derivative * upstream).sum(), bound


def test_a_scale_of_weights_counts_the_weights_of_its_channel() -> None:
    weight = noise(4, 9)
    quantizer = trained_weights(3, weight)
    quantizer.log_scale["4"].data.fill_(-0.5)
    parameter = quantizer.log_scale["4"]
    upstream = noise(4, 9, seed=1)
    (quantizer(weight) * upstream).sum().backward()
    scale = quantizer.scale(weight).double().view(-1, 1)
    rows = zip(weight.double() / scale, upstream.double(), strict=True)
    exact, bounds = zip(*(gradient_of_scale(v, row, -3, 3) for v, row in rows), strict=True)
    outer = scale.view(-1) * math.log(2) / math.sqrt(9 * 3)
    assert_within(parameter.grad, torch.stack(exact) * outer, torch.stack(bounds) * outer)


def test_training_finds_a_scale_of_less_error_than_the_extremes() -> None:
    x = noise(4000)
    point = calibrated(LearnedActivationQuantizer, x, 3, observer="minmax").train()
    optimizer = torch.optim.Adam(point.parameters(), lr=0.02)
    before = float((point(x) - x).square().mean().detach())
    for _ in range(100):
        optimizer.zero_grad()
        (point(x) - x).square().mean().backward()
        optimizer.step()
    assert float((point(x) - x).square().mean().detach()) < 0.6 * before


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("moved", [-60.0, -3.3, 0.0, 0.7, 60.0])
def test_a_step_stays_positive_whatever_an_optimizer_does(power_of_two: bool, moved: float) -> None:
    start, log_scale = torch.tensor([0.3, 0.25]), torch.tensor([moved, moved], requires_grad=True)
    step = learned_step(start, log_scale, power_of_two)
    assert bool((step > 0).all())
    if power_of_two:
        assert torch.equal(torch.frexp(step).mantissa, torch.tensor([0.5, 0.5]))
        assert bool((step.double() >= start.double() * 2.0**moved * (1 - 1e-8)).all())
    else:
        torch.testing.assert_close(step, start * 2.0**moved)
    step.sum().backward()
    assert log_scale.grad is not None
    assert bool((log_scale.grad > 0).all())


# States.


def test_a_calibrated_point_observes_no_more() -> None:
    point = calibrated(LearnedActivationQuantizer, noise(64)).train()
    before = {key: value.clone() for key, value in point.state_dict().items()}
    point(100 * noise(64))
    assert all(torch.equal(value, before[key]) for key, value in point.state_dict().items())


def test_calibrating_again_forgets_what_was_learned() -> None:
    x = noise(64)
    point = calibrated(LearnedActivationQuantizer, x, observer="minmax")
    scale = point.scale
    point.log_scale.data.fill_(1.0)
    assert torch.equal(point.scale, 2 * scale)
    point.start_calibration()
    point(x)
    point.finish_calibration()
    assert torch.equal(point.scale, scale)


def test_frozen_scales_are_constant_and_get_no_gradient() -> None:
    weight = nn.Parameter(noise(4, 9))
    model = nn.ModuleList(
        [calibrated(LearnedActivationQuantizer, noise(64)), trained_weights(4, weight)]
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        (model[0](noise(8, 8)).sum() + model[1](weight).square().sum()).backward()
        optimizer.step()

    step()
    before = [parameter.clone() for parameter in model.parameters()]
    freeze_observers(model)
    step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(bool(value.any()) for value in before)


def test_ranges_of_weights_are_kept_by_the_first_training_step_alone() -> None:
    weight = noise(4, 9)
    quantizer = LearnedWeightQuantizer(4, rows=[4])
    with torch.no_grad():
        quantizer.train()(weight)
    quantizer.eval()(weight)
    first = quantizer.scale(2 * weight)
    assert torch.equal(first, 2 * quantizer.scale(weight))
    quantizer.train()(weight)
    assert torch.equal(quantizer.scale(2 * weight), quantizer.scale(weight))


def test_layers_of_one_quantizer_have_scales_of_their_own() -> None:
    reduce, expand = noise(2, 16, 1, 1), 5 * noise(16, 2, 1, 1)
    quantizer = LearnedWeightQuantizer(8, rows=[2, 16]).train()
    quantizer(reduce), quantizer(expand)
    quantizer.log_scale["16"].data.fill_(1.0)
    assert torch.equal(quantizer.scale(reduce), WeightQuantizer(8).scale(reduce))
    assert torch.equal(quantizer.scale(expand), 2 * WeightQuantizer(8).scale(expand))


@pytest.mark.parametrize("started", [False, True])
def test_a_state_dict_restores_scales_and_ranges(started: bool) -> None:
    weight = noise(4, 9)
    quantizer, restored = LearnedWeightQuantizer(4, rows=[4]), LearnedWeightQuantizer(4, rows=[4])
    if started:
        quantizer.train()(weight)
        quantizer.log_scale["4"].data.fill_(0.3)
    restored.load_state_dict(quantizer.state_dict())
    assert torch.equal(restored.scale(2 * weight), quantizer.scale(2 * weight))
    assert torch.equal(copy.deepcopy(quantizer)(weight), quantizer(weight))
    point = calibrated(LearnedActivationQuantizer, noise(64))
    point.log_scale.data.fill_(-0.4)
    other = LearnedActivationQuantizer()
    other.load_state_dict(point.state_dict())
    assert other.calibrated
    assert torch.equal(other.scale, point.scale)


def test_a_state_without_any_key_leaves_quantizers_as_they_are() -> None:
    quantizer = trained_weights(4, noise(4, 9))
    scale = quantizer.scale(noise(4, 9))
    quantizer.load_state_dict({}, strict=True)
    assert torch.equal(quantizer.scale(3 * noise(4, 9)), scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moving_to_another_type_keeps_what_is_learned(dtype: torch.dtype) -> None:
    point, quantizer = calibrated(LearnedActivationQuantizer, noise(64)), trained_weights(4, noise(4, 9))
    for module in (point, quantizer):
        for parameter in module.parameters():
            parameter.data.fill_(0.123456)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        module.to(dtype)
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
        assert {value.dtype for value in module.parameters()} == {torch.float32}


def test_learned_scales_are_not_decayed() -> None:
    model = nn.ModuleDict(
        {"point": LearnedActivationQuantizer(), "weights": LearnedWeightQuantizer(4, rows=[4, 16])}
    )
    optimizer = make_optimizer(model, Optimizer(weight_decay=0.1))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]
    assert len(optimizer.param_groups[0]["params"]) == 3
