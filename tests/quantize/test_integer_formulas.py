"""The integers of a fake-quantized network follow its formulas in float64, and its training path."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.models.bnext import BNext
from qat.nn.layers import pool2x2
from qat.quantize.calibration import freeze_observers
from qat.quantize.folding import folded_constants, quantized_slope
from qat.quantize.sub_block import FakeQuantSubBlock
from tests.helpers.networks import pixels, quantization
from tests.helpers.networks import toy as random_toy
from tests.helpers.prepared_networks import fake_quantized_sub_blocks
from tests.helpers.rounding_bounds import assert_within, sum_bound
from tests.helpers.toy_networks import ABLATIONS

#: As many channels as real networks begin with. With 8 channels, one product would be so many steps of ``y``
#: that the integer bias, a multiple of 1/64 product, could miss the offset by a quarter of a step.
WIDE = (64, 64, 128)


def put(values: Tensor, point: nn.Module, scale: Tensor | None = None) -> Tensor:
    """float64 values on the grid of ``point`` (or with its integers and another ``scale``)."""
    step = (point.scale if scale is None else scale).double()
    return torch.clamp(torch.round(values / step), point.quant_min, point.quant_max) * step


def affine(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(
        x, norm.running_mean.double(), norm.running_var.double(), norm.weight.double(), norm.bias.double(),
        eps=norm.eps,
    )  # fmt: skip


def attention_formula(module: nn.Module, m: Tensor) -> Tensor:
    def linear(x: Tensor, layer: nn.Conv2d) -> Tensor:
        weight = layer.weight.double()
        step = (weight.abs().amax((1, 2, 3), keepdim=True) / module.weight_quantizer.quant_max).clamp_min(
            1e-30
        )
        return F.conv2d(x, torch.round(weight / step) * step, layer.bias.double())

    hidden = put(linear(put(m, module.pooled), module.se[1]), module.hidden)
    return put(torch.sigmoid(put(linear(hidden, module.se[3]), module.logits)), module.attention)


def sub_block_formula(block: FakeQuantSubBlock, x: Tensor) -> Tensor:
    """The formulas of the module's docstring, in float64."""
    source, target = block.source.quantizer, block.target.quantizer
    slopes = [quantized_slope(prelu.weight).double() for prelu in (block.activation1, block.activation2)]
    signs = torch.where(x + block.move.bias.double() >= 0, 1.0, -1.0).double()
    weight = torch.where(block.binary_conv.weight >= 0, 1.0, -1.0).double()
    acc = F.conv2d(signs, weight, stride=block.stride, padding=block.kernel_size // 2)
    y = put(F.prelu(put(affine(block.norm1, acc), block.y), slopes[1]), block.y)
    residual = put(F.prelu(x, slopes[0]), source) if block.kind == "scale" else x
    even = x
    if block.stride == 2:
        even = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate")
        # In steps: a quarter of the means lies between two integers, and scaling would round those anyhow.
        steps = torch.round(residual / source.scale.double())
        residual = torch.round(pool2x2(steps)) * source.scale.double()
    if not block.has_branch:
        return put(y + residual, target)
    gain, _ = folded_constants(block.norm2)
    offset = (block.norm2.bias.double() - gain * block.norm2.running_mean.double()).view(1, -1, 1, 1)
    attention = torch.ones(1, 1, 1, 1).double()
    if block.infor_recoupling:
        mix = block.scale.double().clamp(0, 1)
        m = mix * even.mean((2, 3), keepdim=True) + (1 - mix) * y.mean((2, 3), keepdim=True)
        attention = attention_formula(block.se, m)
    step = block.gain_step(gain).double()
    g = torch.clamp(torch.round(attention * gain.view(1, -1, 1, 1) / step), -128, 127) * step
    t = g * y
    if block.kind == "scale":
        t = put(t, block.product, block.product_step()) * residual
    branch = put(put(t, block.branch) + put(offset, block.branch), block.branch)
    return put(branch + residual, target)


def assert_nearly_equal(
    found: Tensor, expected: Tensor, step: Tensor, what: str, most: int = 8, share: float = 0.95
) -> None:
    """Check that at least ``share`` of the values are equal, all but 0.2 % at most 3 steps apart, and none
    more than ``most`` steps.

    One step of the pooled vector may be several steps of the attention, and of the product with it.
    """
    apart = ((found.double() - expected.double()) / step.double()).abs().round()
    assert (apart == 0).double().mean() >= share, what
    assert (apart > 3).double().mean() <= 2e-3, what
    assert apart.max() <= most, what


def inputs(model: BNext, side: int = 7, count: int = 8) -> dict[str, Tensor]:
    """The input of each sub-block for random images, on the trunk's grid."""
    found: dict[str, Tensor] = {}
    handles = [
        block.register_forward_hook(lambda _m, args, _o, name=name: found.__setitem__(name, args[0]))
        for name, block in fake_quantized_sub_blocks(model).items()
    ]
    with torch.no_grad():
        model(pixels(11, count, 2 * side))
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("options", ABLATIONS, ids=str)
@pytest.mark.parametrize("trunk", [4, 8])
def test_a_sub_block_s_integers_follow_its_formula_in_float64(options: dict[str, bool], trunk: int) -> None:
    model = random_toy(1, quantization(trunk=trunk), widths=WIDE, **options)
    seen = inputs(model)
    kinds = set()
    for name, block in fake_quantized_sub_blocks(model).items():
        out = block(seen[name])
        expected = sub_block_formula(block, seen[name].double())
        assert_nearly_equal(out, expected, block.target.quantizer.scale, name)
        kinds.add((block.kind, block.kernel_size, block.stride))
    assert {("bias", 1, 1), ("bias", 3, 1)} <= kinds
    assert any(stride == 2 for _, _, stride in kinds)


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bits", [3, 8])
def test_the_stem_s_integers_follow_its_formula_in_float64(stride: int, bits: int) -> None:
    stem = random_toy(2, quantization(stem_weight=bits), stem_stride=stride).feature[0]
    images = pixels(3, 8, 15)
    weight = stem.conv1.weight.double()
    step = weight.abs().amax((1, 2, 3), keepdim=True) / stem.weight_quantizer.quant_max
    image, zero = stem.image.scale.double(), stem.image.zero_point
    x = (torch.clamp(torch.round(images.double() / image) + zero, 0, 255) - zero) * image
    acc = F.conv2d(x, torch.round(weight / step) * step, stride=stride, padding=1)
    expected = put(affine(stem.bn1, acc), stem.trunk)
    assert_nearly_equal(stem(images), expected, stem.trunk.scale, "stem", most=1)
    assert len((expected / stem.trunk.scale).round().unique()) > 100


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_the_head_s_integers_follow_its_formula_in_float64(bits: int) -> None:
    model = random_toy(3, quantization(classifier=bits, fc_weight=bits))
    point = model.feature[-1].trunk_out
    x = model.feature(pixels(1, 16, 16))
    curved = put(F.prelu(x.double(), quantized_slope(model.prelu.weight).double()), point)
    assert_nearly_equal(model.prelu(x), curved, point.scale, "prelu", most=1)
    pooled = put(curved.mean((2, 3)), model.fc.input)
    assert_nearly_equal(model.pool(model.prelu(x)), pooled, model.fc.input.scale, "pool", most=1)
    weight = model.fc.weight.double()
    step = weight.abs().amax(1, keepdim=True) / model.fc.weight_quantizer.quant_max
    logits = F.linear(pooled, torch.round(weight / step) * step, model.fc.bias.double())
    # The bias is an integer of the accumulator: half a unit of it may be missing. Behind the exact sums there
    # is one product, with a factor of two scales, one of which is a quotient.
    half = step.flatten() * model.fc.input.scale / 2
    assert_within(model.fc(pooled.float()), logits, half + sum_bound(logits.abs() + half, 4, torch.float32))


def in_training(module: nn.Module, x: Tensor) -> Tensor:
    """The result of the training path, with frozen grids and running statistics."""
    freeze_observers(module)
    module.train()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    out: Tensor = module(x)
    module.eval()
    return out


@torch.no_grad()
@pytest.mark.parametrize("options", ABLATIONS, ids=str)
@pytest.mark.parametrize("bits", [4, pytest.param(6, marks=pytest.mark.exhaustive), 8])
def test_training_and_integers_agree_to_within_rounding_on_each_sub_block(
    options: dict[str, bool], bits: int
) -> None:
    model = random_toy(5, quantization(trunk=bits, se=bits), widths=WIDE, **options)
    seen = inputs(model)
    for name, block in fake_quantized_sub_blocks(model).items():
        target = block.target.quantizer
        trained = target.requantize(in_training(block, seen[name]))
        # Training breaks the ties of a 2×2 mean, one in four, by float32 rounding; integers go to even.
        share = 0.85 if block.stride == 2 else 0.95
        assert_nearly_equal(block(seen[name]), trained, target.scale, name, share=share)


@torch.no_grad()
@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_on_a_power_of_two_grid_training_and_integers_break_pooling_s_ties_alike(
    options: dict[str, bool],
) -> None:
    model = random_toy(5, widths=WIDE, **options)
    block = next(block for block in fake_quantized_sub_blocks(model).values() if block.stride == 2)
    source, target = block.source.quantizer, block.target.quantizer
    source.scale.copy_(torch.exp2(torch.log2(source.scale).round()))
    x = source.requantize(torch.randn(8, block.channels, 7, 6, generator=torch.Generator().manual_seed(0)))
    trained = target.requantize(in_training(block, x))
    assert_nearly_equal(block(x), trained, target.scale, str(options), share=0.97)


@torch.no_grad()
def test_training_and_integers_agree_to_within_rounding_on_stem_and_head() -> None:
    model = random_toy(5)
    images = pixels(4, 16, 16)
    stem = model.feature[0]
    assert_nearly_equal(in_training(stem, images), stem(images), stem.trunk.scale, "stem", most=1)
    x = model.feature(images)
    point = model.feature[-1].trunk_out
    assert_nearly_equal(in_training(model.prelu, x), model.prelu(x), point.scale, "prelu", most=1)
    x = model.prelu(x)
    pooled = model.fc.input.requantize(in_training(model.pool, x))
    assert_nearly_equal(pooled, model.pool(x), model.fc.input.scale, "pool", most=1)
    # Integers lack up to half a unit of the bias; training adds products of rounded weights, and the bias.
    weight, grid = model.fc.weight, model.fc.weight_quantizer
    magnitudes = F.linear(pooled.abs(), grid(weight).abs(), model.fc.bias.abs()).double()
    unit = weight.abs().amax(1).double() / grid.quant_max * model.fc.input.scale
    bound = unit / 2 + sum_bound(magnitudes + unit, weight.shape[1] + 8, torch.float32)
    assert_within(in_training(model.fc, pooled), model.fc(pooled), bound)
