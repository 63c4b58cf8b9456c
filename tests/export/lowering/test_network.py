"""Lowering: folding, thresholds, multipliers. What is refused is in test_refusals.py."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from qat_export.integer.network import ALWAYS, NEVER
from qat_export.integer.reference import Interpreter
from torch import nn

from qat.models.bnext import BNext
from qat.quantize.activation_quantizers import activation_quantizers
from qat.quantize.folding import folded_constants, slope_scale
from tests.helpers.networks import (
    MEAN,
    STD,
    float_network,
    lowered,
    norms,
    ordinary,
    pixels,
    prepared,
    quantization,
    torch_problems,
    toy,
)


@functools.cache
def shared() -> BNext:
    return toy(0)


def fresh() -> BNext:
    """``toy(0)``, calibrated once: a network of this test's own."""
    return copy.deepcopy(shared())


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


# Parameters that training reaches rarely: each has a rule, and torch follows it.


@pytest.mark.parametrize("gamma", [0.0, -0.0])
def test_a_gamma_of_zero_leaves_its_channel_the_rounded_offset(gamma: float) -> None:
    model = fresh()
    norm = model.feature[1].Attention.norm1
    with torch.no_grad():
        norm.weight[2] = gamma
        norm.bias[2] = 1.3
    network = lowered(model)
    images = pixels(4, 2, 16).numpy()
    assert list(torch_problems(model, network, images, sub_blocks=True)) == []
    interpreter = Interpreter(network)
    interpreter(images)
    step = network.blocks[0].spatial.y_grid.scale
    assert np.unique(interpreter.tensors["feature.1.Attention/conv"][:, 2]) == min(round(1.3 / step), 127)


def test_a_negative_gamma_flips_the_weights_of_its_channel_and_no_multiplier_is_negative() -> None:
    model = fresh()
    norm = model.feature[1].Attention.norm1
    with torch.no_grad():
        norm.weight.abs_()
        before = lowered(model).blocks[0].spatial.conv
        norm.weight[3] *= -1
    network = lowered(model)
    after = network.blocks[0].spatial.conv
    flips = (after.weight() == -before.weight()).reshape(8, -1)
    assert flips.all(1).tolist() == [channel == 3 for channel in range(8)]
    assert not flips[[0, 1, 2, 4, 5, 6, 7]].any()
    np.testing.assert_array_equal(after.multiplier, before.multiplier)
    assert (after.multiplier > 0).all()
    assert list(torch_problems(model, network, pixels(4, 2, 16).numpy(), sub_blocks=True)) == []


def every_norm(model: nn.Module, change: Callable[[nn.BatchNorm2d], object]) -> None:
    with torch.no_grad():
        for norm in norms(model):
            change(norm)


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.running_var.zero_(),
        lambda norm: norm.weight.zero_(),
        lambda norm: norm.weight.neg_(),
        lambda norm: (norm.weight.zero_(), norm.running_var.zero_(), norm.bias.zero_()),
    ],
    ids=["variance 0", "gamma 0", "gamma negated", "all 0"],
)
@pytest.mark.parametrize("infor_recoupling", [True, False])
def test_a_whole_network_of_rare_normalizations_computes_the_same_in_torch(
    infor_recoupling: bool, change: Callable[[nn.BatchNorm2d], object]
) -> None:
    model = toy(0, infor_recoupling=infor_recoupling)
    every_norm(model, change)
    problems = torch_problems(model, lowered(model), pixels(4, 2, 16).numpy(), sub_blocks=True)
    assert list(problems) == []


@pytest.mark.parametrize("slope", [0.0, -0.0, -0.5, -3.0, 1.0, 1.5, 200.0, 1e-9, 1e30, -3e38])
def test_a_slope_of_any_size_and_sign_computes_the_same_in_torch(slope: float) -> None:
    model = fresh()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.PReLU):
                module.weight[::2] = slope
    problems = torch_problems(model, lowered(model), pixels(4, 2, 16).numpy(), sub_blocks=True)
    assert list(problems) == []


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
    model = fresh()
    with torch.no_grad():
        model.fc.weight[2] = 0
        model.fc.bias[2] = -321.5
    head = lowered(model).head.classifier
    assert (head.weight[2] == 0).all()
    assert float(head.bias[2]) * float(head.multiplier[2]) == pytest.approx(-321.5, rel=1e-6)


def test_a_sigmoid_over_a_wide_grid_of_logits_saturates_without_a_warning() -> None:
    model = fresh()
    for name, point in activation_quantizers(model):
        if name.endswith(".logits"):
            point.scale.fill_(10.0)  # exp(1280) overflows float64
    attention = lowered(model).blocks[0].spatial.attention
    assert attention is not None
    assert (attention.table[0], attention.table[128], attention.table[255]) == (0, 128, 255)


def test_lowering_leaves_the_network_as_it_was_and_is_repeatable() -> None:
    model = fresh()
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
