"""Lowering: folding, thresholds, multipliers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from networks import MEAN, STD, float_network, lowered, ordinary, pixels, prepared, quantization, toy
from torch import nn

from export.integer import ALWAYS, NEVER
from export.lower import lower
from export.reference import Interpreter
from qat.bnext import BNext, set_temperature
from qat.data import image_grid
from qat.errors import QuantizationError
from qat.fakequant import activation_quantizers
from qat.folding import folded_constants, slope_scale
from qat.prepare import prepare
from qat.recipe import Group, Quantization, StemGroup, TrunkGroup

# Thresholds.


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_thresholds_agree_with_torch_s_sign_for_every_integer_of_the_trunk(bits: int) -> None:
    model = toy(0, quantization(trunk=bits))
    module = model.feature[1].Attention
    point = model.feature[0].trunk
    with torch.no_grad():
        # On a step, a hair beside it, between steps, at zero, and beyond the range.
        edge = -3 * float(point.scale)
        near = torch.nextafter(torch.tensor(edge), torch.tensor([1.0, -1.0])).tolist()
        module.move.bias[0, :, 0, 0] = torch.tensor([edge, *near, 0.0, -0.0, 1e9, -1e9, edge / 2])
    threshold = lowered(model).blocks[0].spatial.conv.threshold
    integers = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    values = point.requantize(integers.float() * point.scale).view(1, 1, 1, -1).repeat(1, 8, 1, 1)
    with torch.no_grad():
        signs = module.binary_activation(module.move(values))[0, :, 0].numpy()
    assert set(np.unique(signs)) == {-1, 1}
    np.testing.assert_array_equal(signs, np.where(integers.numpy() >= threshold[:, None], 1, -1))
    assert threshold[6] == NEVER
    assert threshold[5] == -(2 ** (bits - 1))
    if bits == 8:
        assert threshold[5] == ALWAYS


# Multipliers and slopes.


@pytest.mark.parametrize("kind", ["product", "sum"])
def test_multipliers_of_a_network_are_exact_in_float32_in_any_order(kind: str) -> None:
    for sub in ordinary()[1].sub_blocks():
        if kind == "sum":
            pair = (sub.branch_multiplier, sub.residual_multiplier)
            assert pair[0].shift == pair[1].shift
            assert sum(m.integer for m in pair) * 128 <= 2**24
            continue
        assert sub.branch is not None
        for multiplier in (sub.branch.first, sub.branch.second):
            assert multiplier is None or multiplier.integer * 128 * 128 <= 2**24


def test_the_scales_that_preparation_chose_make_the_product_multipliers_exact() -> None:
    model, network, _ = ordinary()
    for sub in network.sub_blocks():
        module = model.get_submodule(sub.name)
        gain, _ = folded_constants(module.norm2)
        assert sub.branch is not None
        grid = sub.branch.product or sub.branch.grid
        ratio = sub.y_grid.scale * float(module.gain_step(gain)) / grid.scale
        assert sub.branch.first.value == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize(
    "slopes", [(0.25, -0.5), (0.0, 0.0), (1e-9, 0.0), (3.0, -7.0), (127.0, 1.0), (0.9999, 0.3)]
)
def test_integer_slopes_are_the_slopes_that_torch_uses(slopes: tuple[float, float]) -> None:
    model = float_network(0)
    with torch.no_grad():
        model.prelu.weight.copy_(torch.tensor(slopes).repeat(16))
    found = lowered(prepared(model)).head.slopes
    scale = float(slope_scale(model.prelu.weight))
    assert scale == 2.0**-found.shift
    with torch.no_grad():
        torch_slopes = torch.fake_quantize_per_tensor_affine(model.prelu.weight, scale, 0, -128, 127).numpy()
    np.testing.assert_array_equal(np.ldexp(found.integers.astype(np.float64), -found.shift), torch_slopes)


def test_what_is_lowered_are_the_constants_that_the_network_computes_with() -> None:
    model, network, _ = ordinary()
    for affine, layer in (
        (network.stem.conv, model.feature[0].integers()),
        (network.head.classifier, model.fc.integers()),
    ):
        np.testing.assert_array_equal(affine.weight, layer.weight.numpy())
        np.testing.assert_array_equal(affine.bias, layer.requantization.bias.numpy())
        np.testing.assert_array_equal(affine.multiplier, layer.requantization.multiplier.numpy())
    assert network.head.mean == model.pool.multiplier().item()
    for sub in network.sub_blocks():
        constants = model.get_submodule(sub.name).integers()
        np.testing.assert_array_equal(sub.conv.weight(), constants.conv.weight.numpy())
        np.testing.assert_array_equal(sub.conv.bias, constants.conv.requantization.bias.numpy())
        np.testing.assert_array_equal(sub.conv.multiplier, constants.conv.requantization.multiplier.numpy())
        np.testing.assert_array_equal(
            np.ldexp(sub.slopes.integers.astype(np.float64), -sub.slopes.shift), constants.slopes.numpy()
        )
        assert (sub.branch_multiplier, sub.residual_multiplier) == (
            constants.sum.branch,
            constants.sum.residual,
        )
        assert sub.branch is not None
        assert constants.branch is not None
        assert (sub.branch.first, sub.branch.second) == (constants.branch.first, constants.branch.second)


def test_a_row_of_zeros_in_the_classifier_keeps_its_bias() -> None:
    model = toy(0)
    with torch.no_grad():
        model.fc.weight[2] = 0
        model.fc.bias[2] = -321.5
    head = lowered(model).head.classifier
    assert (head.weight[2] == 0).all()
    assert float(head.bias[2]) * float(head.multiplier[2]) == pytest.approx(-321.5, rel=1e-6)


def test_a_sigmoid_over_a_wide_grid_of_logits_saturates_without_a_warning() -> None:
    model = toy(0)
    for name, point in activation_quantizers(model):
        if name.endswith(".logits"):
            point.scale.fill_(10.0)  # exp(1280) overflows float64
    attention = lowered(model).blocks[0].spatial.attention
    assert attention is not None
    assert (attention.table[0], attention.table[128], attention.table[255]) == (0, 128, 255)


def test_lowering_leaves_the_network_as_it_was_and_is_repeatable() -> None:
    model = toy(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = pixels(0, 2, 16).numpy()
    first, second = (Interpreter(lowered(model))(images) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_the_caller_states_is_carried_along() -> None:
    model = toy(0, num_classes=2)
    network = lowered(model, 24, class_names=["cat", "dog"], metadata={"a": "b"})
    assert (network.image_size, network.class_names, network.metadata) == (24, ("cat", "dog"), {"a": "b"})
    assert (network.mean, network.std) == (MEAN, STD)
    assert lowered(model).class_names == ("0", "1")


# Refusals.


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


def test_a_temperature_that_has_not_annealed_is_refused() -> None:
    model = toy(0)
    set_temperature(model, 1e-3)
    with pytest.raises(
        QuantizationError, match=r"^feature\.1\.FFN_1\.binary_conv: temperature 0\.001|Attention"
    ):
        lowered(model)


def _set(name: str, value: float) -> Callable[[BNext], None]:
    def change(model: BNext) -> None:
        module, _, leaf = name.rpartition(".")
        getattr(model.get_submodule(module), leaf).data.reshape(-1)[0] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "feature.0.conv1.weight",
        "feature.2.Attention.move.bias",
        "fc.bias",
        "feature.1.FFN_1.norm1.running_mean",
    ],
)
def test_a_parameter_that_is_not_finite_is_refused_by_name(name: str, value: float) -> None:
    model = toy(0)
    _set(name, value)(model)
    with pytest.raises(QuantizationError, match=rf"^{name.replace('.', '[.]')}: holds NaN or infinity"):
        lowered(model)


def test_a_negative_variance_is_refused_by_name() -> None:
    model = toy(0)
    _set("feature.1.Attention.norm2.running_var", -1e-3)(model)
    with pytest.raises(
        QuantizationError, match=r"^feature\.1\.Attention\.norm2\.running_var: a variance is negative"
    ):
        lowered(model)


def test_other_modules_are_refused_too() -> None:
    with pytest.raises(QuantizationError):
        lower(nn.Linear(2, 2), image_size=8, mean=MEAN, std=STD)  # type: ignore[arg-type]
