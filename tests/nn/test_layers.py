"""The layers of BNext follow their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.errors import QuantizationError
from qat.models.bnext import Architecture, BNext
from qat.nn.layers import (
    BinaryActivation,
    BinaryConv2d,
    LearnableBias,
    SqueezeExcitation,
    Stem,
    pool2x2,
    spatial_mean,
)
from qat.nn.sub_block import SubBlock


def test_pooling_is_the_plain_2x2_mean_on_even_sides() -> None:
    x = torch.randn(2, 3, 6, 8)
    assert torch.equal(pool2x2(x), F.avg_pool2d(x, 2))


def test_pooling_repeats_the_last_row_and_column_of_odd_sides() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]]).view(1, 1, 1, 3)
    assert pool2x2(x).flatten().tolist() == [1.5, 3.0]


@pytest.mark.parametrize("side", range(1, 9))
@pytest.mark.parametrize("kind", ["bias", "scale"])
def test_the_residual_fits_the_convolution_of_stride_2_at_any_side(side: int, kind: Any) -> None:
    out = SubBlock(8, 3, 2, kind).eval()(torch.randn(1, 8, side, side))
    assert out.shape[-2:] == (math.ceil(side / 2), math.ceil(side / 2))


def test_the_binary_convolution_pads_with_zeros_after_the_sign() -> None:
    convolution = BinaryConv2d(1, 3, 1).eval()
    convolution.temperature.fill_(1e-8)
    with torch.no_grad():
        convolution.weight.fill_(0.01)
    sums = convolution(torch.ones(1, 1, 3, 3))
    assert sums.flatten().tolist() == [4, 6, 4, 6, 9, 6, 4, 6, 4]


@pytest.mark.parametrize(("training", "frozen", "largest"), [(1, 0, 1.5), (0, 0, 4.0), (1, 1, 4.0)])
def test_latent_weights_are_clamped_only_while_they_train(
    training: bool, frozen: bool, largest: float
) -> None:
    convolution = BinaryConv2d(2, 1, 1).train(bool(training))
    with torch.no_grad():
        convolution.weight.fill_(-4.0)
    convolution.weight.requires_grad_(not frozen)
    convolution(torch.ones(1, 2, 2, 2))
    assert convolution.weight.abs().max() == largest


def test_the_mix_scale_is_used_in_0_to_1_and_kept_there_while_training() -> None:
    block = SubBlock(8, 1, 1, "bias")
    with torch.no_grad():
        block.scale.fill_(1.7)
    assert block.eval().mix_scale().eq(1).all()
    assert block.scale.eq(block.scale.new_tensor(1.7)).all()
    block.train().mix_scale()
    assert block.scale.eq(1).all()


def test_the_bias_moves_and_the_activation_temperature_does_nothing() -> None:
    move, activation = LearnableBias(2), BinaryActivation()
    with torch.no_grad():
        move.bias[0, 1] = -3.0
    activation.temperature.fill_(0.1)
    assert activation(move(torch.full((1, 2, 1, 1), 2.0))).flatten().tolist() == [1.0, -1.0]


@pytest.mark.parametrize(("channels", "hidden"), [(64, 8), (8, 1), (4, 1)])
def test_channel_attention_reduces_by_eight_to_at_least_one(channels: int, hidden: int) -> None:
    attention = SqueezeExcitation(channels)
    assert attention.se[1].weight.shape == (hidden, channels, 1, 1)
    result = attention(torch.randn(2, channels, 1, 1))
    assert result.shape == (2, channels, 1, 1)
    assert ((result > 0) & (result < 1)).all()


def live(block: SubBlock) -> SubBlock:
    """``block`` in float64 evaluation mode with parameters that all matter."""
    block = block.double().eval()
    with torch.no_grad():
        for index, tensor in enumerate([*block.parameters(), *block.buffers()]):
            if tensor.is_floating_point():
                random = torch.Generator().manual_seed(index)
                tensor.copy_(torch.rand(tensor.shape, generator=random, dtype=torch.float64) * 0.8 + 0.1)
        block.binary_conv.weight.sub_(0.5)
        block.move.bias.sub_(0.5)
        block.binary_conv.temperature.fill_(1e-8)
    return block


def norm(module: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["bias", "scale"])
@pytest.mark.parametrize("recoupling", [True, False])
def test_a_sub_block_computes_its_formula(stride: int, kind: Any, recoupling: bool) -> None:
    block = live(SubBlock(8, 3, stride, kind, recoupling))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    pooled = F.avg_pool2d(x, 2) if stride == 2 else x
    weight = torch.sign(block.binary_conv.weight)
    y = F.conv2d(torch.sign(x + block.move.bias), weight, stride=stride, padding=1)
    y = F.prelu(norm(block.norm1, y), block.activation2.weight)
    attention = torch.ones(1, dtype=torch.float64)
    if recoupling:
        mixed = spatial_mean(block.scale * pooled + (1 - block.scale) * y)
        hidden = F.relu(F.conv2d(mixed, block.se.se[1].weight, block.se.se[1].bias))
        attention = torch.sigmoid(F.conv2d(hidden, block.se.se[3].weight, block.se.se[3].bias))
    if kind == "scale":
        residual = F.prelu(x, block.activation1.weight)
        residual = F.avg_pool2d(residual, 2) if stride == 2 else residual
        expected = norm(block.norm2, attention * y * residual) + residual
    elif recoupling:
        expected = norm(block.norm2, attention * y) + pooled
    else:
        expected = y + pooled
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_the_stem_ignores_its_prelu() -> None:
    stem = Stem(4, 1).eval()
    x = torch.randn(1, 3, 5, 5)
    before = stem(x)
    with torch.no_grad():
        stem.prelu.weight.fill_(9.0)
    assert torch.equal(stem(x), before)
    assert torch.equal(before, stem.bn1(stem.conv1(x)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem_stride": 3}, "stem_stride 3"),
        ({"stem_stride": 0}, "stem_stride 0"),
        ({"num_classes": 2.5}, "whole numbers"),
        ({"num_classes": 0}, "num_classes 0"),
        ({"widths": [8.0, 16]}, "whole numbers"),
    ],
)
def test_numbers_that_make_no_network_are_refused(options: dict[str, Any], message: str) -> None:
    assert Architecture.of("tiny", 10, stem_stride=2).stem_stride == 2
    with pytest.raises(QuantizationError, match=message):
        BNext(**options)
