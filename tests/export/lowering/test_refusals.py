"""What lowering refuses, each rule with the name of the module."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from qat_export.lowering.network import lower
from qat_export.lowering.refusals import LARGEST_STEP
from torch import Tensor, nn

from qat.errors import QuantizationError
from qat.models.bnext import BNext, set_temperature
from qat.nn.layers import BinaryConv2d
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.image_grid import image_grid
from qat.quantize.preparation import prepare
from qat.recipe.schema import Group, Quantization, StemGroup, TrunkGroup
from tests.helpers.cases import combinations, slow
from tests.helpers.networks import MEAN, STD, float_network, lowered, quantization, toy


@functools.cache
def shared() -> BNext:
    return toy(0)


def fresh() -> BNext:
    """``toy(0)``, calibrated once: a network of this test's own."""
    return copy.deepcopy(shared())


# What was never made an integer network.


def test_a_float_network_is_refused() -> None:
    with pytest.raises(QuantizationError, match="float-rest network"):
        lowered(float_network())


def test_an_uncalibrated_network_is_refused_naming_the_point() -> None:
    model = float_network()
    prepare(model, quantization(), image_grid(MEAN, STD))
    with pytest.raises(QuantizationError, match=r"^feature\.0\.trunk: not calibrated"):
        lowered(model)


GROUPS = [
    (Quantization(stem=StemGroup(enabled=False)), r"^feature\.0: left in float"),
    (Quantization(se=Group(enabled=False)), r"^feature\.1\.Attention\.se: left in float"),
    (Quantization(classifier=Group(enabled=False)), r"^fc: left in float"),
    (Quantization(trunk=TrunkGroup(enabled=False)), r"^feature\.0\.trunk: left in float"),
    (Quantization(exclude=["feature.2.FFN"]), r"^feature\.2\.FFN: left in float"),
    (Quantization(exclude=["feature.2.FFN.se"]), r"^feature\.2\.FFN\.se: left in float"),
    (Quantization(exclude=["feature.3.trunk_mid"]), r"^feature\.3\.trunk_mid: left in float"),
    (Quantization(exclude=["prelu"]), r"^prelu: left in float"),
    (Quantization(include=["feature.*"]), r"^prelu: left in float"),
]


@pytest.mark.parametrize(("bits", "message"), GROUPS)
def test_what_is_left_in_float_is_refused_by_name(bits: Quantization, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        lowered(toy(0, bits))


def test_other_modules_are_refused_too() -> None:
    with pytest.raises(QuantizationError):
        lower(nn.Linear(2, 2), image_size=8, mean=MEAN, std=STD)  # type: ignore[arg-type]


# Weights that are not ±1.


@pytest.mark.parametrize("temperature", [1e-7, 1e-3, 1.0])
def test_a_temperature_that_has_not_annealed_is_refused_by_name(temperature: float) -> None:
    model = fresh()
    set_temperature(model.feature[2].FFN, temperature)
    message = rf"^feature\.2\.FFN\.binary_conv: temperature {temperature:.3g} is not below 1e-7, .* not ±1"
    with pytest.raises(QuantizationError, match=message):
        lowered(model)


def test_the_first_temperature_below_the_limit_is_accepted() -> None:
    model = fresh()
    set_temperature(model, 9.9e-8)
    lowered(model)


class ScaledConv(BinaryConv2d):
    """Binary weights with a magnitude, as other binary networks have them."""

    magnitude = 0.5

    def effective_weight(self) -> Tensor:
        return super().effective_weight() * self.magnitude


@pytest.mark.parametrize("magnitude", [0.5, 1.0001, float("nan")])
def test_weights_of_another_magnitude_are_refused_by_name(magnitude: float) -> None:
    model = fresh()
    conv = ScaledConv(8, 1, 1)
    conv.load_state_dict(model.feature[1].FFN_2.binary_conv.state_dict())
    model.feature[1].FFN_2.binary_conv = conv
    conv.magnitude = 1.0
    lowered(model)
    conv.magnitude = magnitude
    found = rf"not ±1: found magnitudes from {magnitude:.3g} to {magnitude:.3g}$"
    with pytest.raises(QuantizationError, match=rf"^feature\.1\.FFN_2\.binary_conv: .*{found}"):
        lowered(model)


# Parameters without a rule.


def put(name: str, value: float) -> Callable[[BNext], None]:
    """Set the first element of a parameter or buffer."""

    def change(model: BNext) -> None:
        model.state_dict()[name].reshape(-1)[0] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), slow(float("inf")), slow(-float("inf"))])
@pytest.mark.parametrize(
    "name",
    [
        "feature.0.conv1.weight",
        "feature.1.Attention.binary_conv.weight",
        "feature.2.Attention.move.bias",
        "feature.2.Attention.activation1.weight",
        "prelu.weight",
        "fc.bias",
        "feature.1.FFN_1.norm1.running_mean",
        "feature.1.FFN_1.norm2.weight",
        "feature.3.FFN_1.se.logits.fake.scale",
    ],
)
def test_a_value_that_is_not_finite_is_refused_by_name(name: str, value: float) -> None:
    model = fresh()
    put(name, value)(model)
    with pytest.raises(QuantizationError, match=rf"^{re.escape(name)}: holds (NaN|an infinity)$"):
        lowered(model)


def test_a_negative_variance_is_refused_by_name() -> None:
    model = fresh()
    put("feature.1.Attention.norm2.running_var", -1e-3)(model)
    with pytest.raises(
        QuantizationError, match=r"^feature\.1\.Attention\.norm2\.running_var: a variance is negative"
    ):
        lowered(model)


#: Finite, but what they are folded into is no float32 number.
HUGE = [
    ("feature.0.bn1.weight", r"^feature\.0: a folded gain or offset of .* is no float32 number$"),
    ("feature.1.FFN_2.norm1.weight", r"^feature\.1\.FFN_2: a folded gain or offset of "),
    ("feature.1.FFN_2.norm1.bias", r"^feature\.1\.FFN_2: a folded gain or offset of "),
    ("feature.1.FFN_2.norm1.running_mean", r"^feature\.1\.FFN_2: a folded gain or offset of "),
    ("feature.1.FFN_2.norm2.weight", r"^feature\.1\.FFN_2\.norm2: a folded gain of .* is no float32 number$"),
    ("feature.2.Attention.norm2.weight", r"^feature\.2\.Attention\.norm2: a folded gain of "),
    ("feature.1.Attention.se.se.3.bias", r"^feature\.1\.Attention\.se: a folded gain or offset of "),
    (
        "feature.0.conv1.weight",
        r"^feature\.0\.conv\.multiplier: .* times the largest accumulator is no float32",
    ),
    ("feature.1.Attention.se.se.1.weight", r"^feature\.1\.Attention\.se\.reduce\.multiplier: "),
    ("fc.weight", r"^fc\.multiplier: "),
]


@pytest.mark.parametrize("sign", [1, slow(-1)])
@pytest.mark.parametrize(("name", "message"), HUGE)
def test_a_huge_parameter_is_refused_by_the_name_of_its_layer(name: str, message: str, sign: int) -> None:
    model = fresh()
    if "norm2" in name:  # whatever the images were: 3e38 over 0.003 is no float32 number
        model.state_dict()[name.replace("weight", "running_var")].zero_()
    put(name, sign * 3e38)(model)
    with pytest.raises(QuantizationError, match=message):
        lowered(model)


def test_one_slope_shared_by_all_channels_is_refused_by_name() -> None:
    model = fresh()
    model.feature[1].FFN_1.activation2 = nn.PReLU()
    with pytest.raises(
        QuantizationError, match=r"^feature\.1\.FFN_1\.slopes\.integers: shape \[1\], expected \[8\]"
    ):
        lowered(model)


# Grids without a rule.

POINTS = [
    "feature.0.trunk",
    "feature.1.trunk_mid",
    "feature.3.trunk_out",
    "feature.1.Attention.y",
    "feature.2.Attention.product",
    "feature.2.Attention.branch",
    "feature.1.FFN_1.se.pooled",
    "feature.1.FFN_1.se.hidden",
    "feature.1.FFN_1.se.logits",
    "fc.input",
]


@combinations(
    {"name": POINTS, "step, said": [(0.0, "0"), (-0.1, "-0.1"), (1e-45, "1.4e-45"), (3e38, "3e+38")]}
)
def test_a_step_without_a_rule_is_refused_by_the_name_of_the_point(name: str, step: float, said: str) -> None:
    model = fresh()
    dict(activation_quantizers(model))[name].scale.fill_(step)
    message = f"{name}: a step of {said}, allowed: 8.67e-19 to 1.15e+18"
    with pytest.raises(QuantizationError, match=f"^{re.escape(message)}$"):
        lowered(model)


def test_the_image_s_step_has_the_same_bounds() -> None:
    model = fresh()
    put("feature.0.image.scale", 0.0)(model)
    with pytest.raises(QuantizationError, match=r"^feature\.0\.image: a step of 0, allowed"):
        lowered(model)


@pytest.mark.parametrize("step", [1 / LARGEST_STEP, LARGEST_STEP])
def test_the_last_steps_within_the_bounds_are_accepted(step: float) -> None:
    model = fresh()
    dict(activation_quantizers(model))["fc.input"].scale.fill_(step)
    assert lowered(model).head.input.scale == step


@pytest.mark.parametrize("infor_recoupling", [True, False])
def test_steps_too_far_apart_for_a_branch_are_refused_by_the_name_of_the_sub_block(
    infor_recoupling: bool,
) -> None:
    model = toy(0, infor_recoupling=infor_recoupling)
    points = dict(activation_quantizers(model))
    for name, step in {"product": LARGEST_STEP, "branch": 1 / LARGEST_STEP}.items():
        points[f"feature.2.Attention.{name}"].scale.fill_(step)
    points["feature.1.trunk_out"].scale.fill_(LARGEST_STEP)
    message = r"^feature\.2\.Attention: the steps of its grids are too far apart: its \w+ needs a step of "
    with pytest.raises(QuantizationError, match=message):
        lowered(model)


def test_a_zero_point_that_a_signed_grid_has_not_is_refused_by_name() -> None:
    model = fresh()
    dict(activation_quantizers(model))["feature.1.FFN_1.y"].fake.zero_point.fill_(3)
    with pytest.raises(QuantizationError, match=r"^feature\.1\.FFN_1\.y: zero point 3, allowed: 0$"):
        lowered(model)


# What the caller states.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ["cat", "dog"]}, r"^class_names: 2, but the classifier \(fc\) has 10 rows$"),
        ({"image_size": 0}, r"^image_size: 0, expected at least 1$"),
        ({"mean": (0.5,)}, r"^mean: \(0\.5,\), expected 3 finite numbers$"),
        ({"std": (0.5, 0.0, 0.5)}, r"^std: .* expected 3 finite numbers above 0$"),
    ],
)
def test_facts_that_no_network_has_are_refused(options: dict[str, Any], message: str) -> None:
    model = fresh()
    facts: dict[str, Any] = {"image_size": 16, "mean": MEAN, "std": STD}
    lower(model, **facts)
    with pytest.raises(QuantizationError, match=message):
        lower(model, **facts | options)


def test_a_refusal_leaves_the_network_as_it_was() -> None:
    model = fresh()
    put("feature.1.FFN_2.norm2.weight", 3e38)(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(QuantizationError):
        lowered(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
