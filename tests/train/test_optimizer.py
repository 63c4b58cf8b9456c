"""The schedules, the distillation loss and the optimizer's parameter groups."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from qat.models.bnext import binary_convolutions
from qat.recipe.schema import Optimizer, Temperature
from qat.train.optimizer import (
    distillation_loss,
    learning_rate_factor,
    learning_rate_factors,
    make_optimizer,
    temperature_at,
)
from tests.helpers.networks import toy

# Schedules


def test_the_temperature_falls_geometrically_between_its_ends() -> None:
    schedule = Temperature(start=1.0, end=1e-8, share=0.5)
    assert temperature_at(schedule, 0.0, 8) == 1.0
    assert temperature_at(schedule, 0.25, 8) == pytest.approx(1e-4)
    steps = [temperature_at(schedule, 0.5 * i / 16, 8) for i in range(17)]
    ratios = [after / before for before, after in itertools.pairwise(steps)]
    assert ratios == pytest.approx([ratios[0]] * 16)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 1 / 3, 1.0])
def test_the_temperature_is_below_1e_7_from_its_share_on(share: float) -> None:
    schedule = Temperature(start=1.0, end=9.9e-8, share=share)
    for at in (share, min(1.0, share + 0.1), 1.0):
        assert temperature_at(schedule, at, 8) == schedule.end < 1e-7
    assert temperature_at(schedule, share * 0.99, 8) > 1e-7


def test_the_learning_rate_rises_linearly_then_falls_as_a_cosine_to_its_floor() -> None:
    optimizer = Optimizer(warmup=0.1, min_lr=0.2)
    factors = [learning_rate_factor(optimizer, step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.6)
    assert factors[100] == pytest.approx(0.2)
    assert all(before > after for before, after in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (1.0, 1), (1.0, 7), (0.0, 0), (0.5, 2)])
def test_learning_rates_stay_in_range_for_short_and_odd_schedules(warmup: float, steps: int) -> None:
    optimizer = Optimizer(warmup=warmup)
    assert all(0 < learning_rate_factor(optimizer, step, steps) <= 1 for step in range(max(steps, 1)))


# Loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_the_scaled_divergence_of_softened_outputs(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), 3 * torch.randn(5, 7)

    def softened(row: list[float]) -> list[float]:
        powers = [math.exp(value / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        total += sum(p * math.log(p / q) for p, q in zip(softened(theirs), softened(ours), strict=True))
    found = float(distillation_loss(student, teacher, temperature))
    assert found == pytest.approx(temperature**2 * total / 5, rel=1e-4)


def test_equal_outputs_cost_nothing_and_the_order_of_arguments_matters() -> None:
    a, b = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert float(distillation_loss(a, a, 2.0)) == pytest.approx(0.0, abs=1e-7)
    assert float(distillation_loss(a, b, 1.0)) != pytest.approx(float(distillation_loss(b, a, 1.0)), rel=1e-2)


# Optimizer


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_trainable_parameter_is_in_one_group_and_binary_weights_are_not_decayed(name: str) -> None:
    model = toy()
    settings = Optimizer(name=name, lr=0.1, binary_lr=0.01, weight_decay=0.5)
    optimizer = make_optimizer(model, settings)
    found = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in model.parameters()}
    binary = {id(conv.weight) for conv in binary_convolutions(model).values()}
    decayed = {
        id(parameter)
        for group in optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert not decayed & binary
    assert {rates[one] for one in binary} == {0.01}
    assert {rate for one, rate in rates.items() if one not in binary} == {0.1}
    names = {key for key, parameter in model.named_parameters() if id(parameter) in decayed}
    assert {"fc.weight", "feature.0.conv1.weight"} <= names
    assert not any("bn" in key or key.endswith("bias") or "prelu" in key.lower() for key in names)


def test_binary_weights_take_the_common_rate_where_they_have_none_of_their_own() -> None:
    assert {group["lr"] for group in make_optimizer(toy(), Optimizer(lr=0.3)).param_groups} == {0.3}


def test_frozen_parameters_are_left_out() -> None:
    model = toy()
    for conv in binary_convolutions(model).values():
        conv.weight.requires_grad_(False)
    found = {id(p) for group in make_optimizer(model, Optimizer()).param_groups for p in group["params"]}
    assert found == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_published_groups_decay_four_dimensions_alike_and_all_others_otherwise() -> None:
    model = toy()
    optimizer = make_optimizer(model, Optimizer(weight_decay=1e-3, kernel_decay=1e-8))
    found = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    names = {name: (parameter.ndim, found[id(parameter)]) for name, parameter in model.named_parameters()}
    assert {decay for ndim, decay in names.values() if ndim == 4} == {1e-8}
    assert {decay for ndim, decay in names.values() if ndim != 4} == {1e-3}
    assert names["feature.1.Attention.binary_conv.weight"][0] == 4
    assert names["feature.1.Attention.norm1.weight"][0] == 1
    rates = make_optimizer(model, Optimizer(lr=0.1, binary_lr=0.01, kernel_decay=0.0)).param_groups
    assert [group["lr"] for group in rates] == [0.01, 0.1, 0.1, 0.1]
    # A `kernel_decay` of 0 is not the same as null.
    assert all(not group["weight_decay"] for group in rates)


@pytest.mark.parametrize(("epochs", "steps"), [(153, 7), (200, 1251), (512, 2502)])
def test_a_temperature_of_steps_stays_within_an_epoch_and_falls_between_two(epochs: int, steps: int) -> None:
    schedule = Temperature(start=1.0, end=1e-8, decay=0.9)
    for epoch in range(epochs):
        for step in (0, 1, steps - 1):
            share = (epoch * steps + step) / (epochs * steps)
            assert temperature_at(schedule, share, epochs) == max(0.9**epoch, 1e-8), (epoch, step)
    assert temperature_at(schedule, 1.0, epochs) < 1e-7
    assert (
        temperature_at(schedule, 152 / epochs, epochs) > 1e-7 > temperature_at(schedule, 153 / epochs, epochs)
    )


@pytest.mark.parametrize("kernel_decay", [None, 0.2])
def test_the_classifier_has_a_rate_of_its_own_where_the_recipe_says_so(kernel_decay: float | None) -> None:
    model = toy()
    settings = Optimizer(lr=1e-3, head_lr=1e-2, weight_decay=0.1, kernel_decay=kernel_decay)
    groups = make_optimizer(model, settings).param_groups
    head = {id(parameter): group for group in groups for parameter in group["params"] if group.get("head")}
    assert head.keys() == {id(model.fc.weight), id(model.fc.bias)}
    assert {group["lr"] for group in head.values()} == {1e-2}
    assert head[id(model.fc.weight)]["weight_decay"] == 0.1
    assert head[id(model.fc.bias)]["weight_decay"] == (0.0 if kernel_decay is None else 0.1)
    count = sum(len(group["params"]) for group in groups)
    assert count == len(list(model.parameters()))
    assert not any(group.get("head") for group in make_optimizer(model, Optimizer(lr=1e-3)).param_groups)


def test_while_the_classifier_trains_alone_the_others_wait_and_begin_their_schedule_afterwards() -> None:
    settings = Optimizer(warmup=0.1)
    optimizer = make_optimizer(toy(), settings, own_head=True)
    factors = learning_rate_factors(optimizer, settings, 100, head_steps=20)
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        found = [factor(step) for step in range(100)]
        whole = [learning_rate_factor(settings, step, 100) for step in range(100)]
        waits = [0.0] * 20 + [learning_rate_factor(settings, step, 80) for step in range(80)]
        assert found == (whole if group.get("head") else waits)
