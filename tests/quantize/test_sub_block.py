"""A fake-quantized sub-block in training: values and gradients of the plain formula, in float64."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.nn.layers import pool2x2
from qat.nn.sub_block import SubBlock
from qat.ops.batch_norm import folded_batch_norm
from qat.ops.binary import binarize_activation
from qat.quantize.activation_quantizers import ActivationQuantizer, fake_quantize_symmetric
from qat.quantize.calibration import calibrate, freeze_observers
from qat.quantize.folding import CONSTANT_BITS, largest_gain_step
from qat.quantize.observers import Observer
from qat.quantize.preparation import prepare
from qat.quantize.quantizer_base import Quantizer
from qat.quantize.sub_block import FakeQuantSubBlock
from qat.recipe.schema import Quantization, TrunkGroup
from qat.sensitivity.variants import signal_to_noise
from tests.helpers.cases import combinations, exhaustive
from tests.helpers.networks import toy
from tests.helpers.toy_networks import ABLATIONS, build_float_toy, toy_images


def observe(point: Quantizer, x: Tensor) -> None:
    """Update the grid of ``point`` as torch's own observer does, from all values of ``x``."""
    moves = isinstance(point, ActivationQuantizer) and point.observer == "moving_average"
    if isinstance(point, ActivationQuantizer) and moves and point.observing:
        point.fake.activation_post_process(x.detach().float())
        point.finish_calibration()


def on_grid(point: Quantizer, x: Tensor) -> Tensor:
    """Round to the grid of ``point``, with a straight-through gradient by `detach`."""
    if not isinstance(point, ActivationQuantizer):
        return x
    steps = (x * float(point.scale.reciprocal())).detach()
    clamped = steps.round().clamp(point.quant_min, point.quant_max)
    passed = x * (steps.round() == clamped)
    return passed + ((clamped * float(point.scale)).float() - passed).detach()


def batch_affine(norm: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    if norm.training:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    else:
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    gain = norm.weight * torch.rsqrt(variance + norm.eps)
    return gain.view(1, -1, 1, 1), (norm.bias - mean * gain).view(1, -1, 1, 1)


def plain(block: FakeQuantSubBlock, x: Tensor) -> Tensor:
    """The formula of `qat.quantize.sub_block`, operator by operator."""
    trunk = block.source.quantizer
    accumulated = block.binary_conv(binarize_activation(x + block.move.bias, zero_is_positive=True))
    gain1, offset1 = batch_affine(block.norm1, accumulated)
    y = accumulated * gain1 + offset1
    observe(block.y, y)
    y = on_grid(block.y, F.prelu(on_grid(block.y, y), block.slope(block.activation2)))
    residual = x
    if block.kind == "scale":
        residual = on_grid(trunk, F.prelu(x, block.slope(block.activation1)))
    if block.stride == 2:
        residual = on_grid(trunk, pool2x2(residual))
    if not block.has_branch:
        return y + residual
    attention = (
        block.se(block.mix_means(x, y)) if block.infor_recoupling else torch.ones_like(block.move.bias)
    )
    branch = attention * y * residual if block.kind == "scale" else attention * y
    gain2, offset2 = batch_affine(block.norm2, branch)
    gain = attention * gain2
    if isinstance(block.gain, ActivationQuantizer):
        observe(block.gain, gain)
        gain = on_grid(block.gain, gain)
    else:
        gain = fake_quantize_symmetric(gain, block.gain_step(gain2), CONSTANT_BITS)
    branch = gain * y
    if block.kind == "scale":
        observe(block.product, branch)
        branch = on_grid(block.product, branch) * residual
    observe(block.branch, torch.maximum(torch.maximum(branch.abs(), (branch + offset2).abs()), offset2.abs()))
    branch = on_grid(block.branch, on_grid(block.branch, branch) + on_grid(block.branch, offset2))
    return branch + residual


def sub_blocks(model: nn.Module) -> list[tuple[str, FakeQuantSubBlock]]:
    return [(name, block) for name, block in model.named_modules() if isinstance(block, FakeQuantSubBlock)]


#: Shape, frozen, spread: each pair of values of any two.
HALF = [((7, 6), False, 1.0), ((7, 6), True, 3.0), ((2, 2), False, 3.0), ((2, 2), True, 1.0)]
OTHER_HALF = [(shape, not frozen, spread) for shape, frozen, spread in HALF]


@combinations(
    {
        "observer": ["percentile", "moving_average"],
        "options": ABLATIONS,
        "shape, frozen, spread": [*HALF, *(exhaustive(*case) for case in OTHER_HALF)],
    }
)
@pytest.mark.usefixtures("passes")
def test_training_computes_the_plain_formula_and_its_gradients(
    options: dict[str, bool], spread: float, frozen: bool, shape: tuple[int, int], observer: Observer
) -> None:
    """With an observer that looks at values between operations, and with one that allows fused passes."""
    quantization = Quantization(trunk=TrunkGroup(observer=observer, percentile=99.0))
    model = toy(0, quantization, **options).double().train()
    for name, block in sub_blocks(model):
        other = copy.deepcopy(block)
        if frozen:
            for candidate in (block, other):
                candidate.norm1.eval()
                candidate.norm2.eval()
        random = torch.Generator().manual_seed(1)
        trunk = cast(ActivationQuantizer, block.source.quantizer)
        x = trunk.requantize(
            spread * torch.randn(6, block.channels, *shape, generator=random, dtype=torch.float64)
        ).requires_grad_()
        found, expected = block(x), plain(other, x)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6, msg=name)
        incoming = torch.randn(found.shape, generator=random, dtype=torch.float64)
        inputs = [key for key, _ in block.named_parameters()]
        gradients = (
            torch.autograd.grad(out, [x, *candidate.parameters()], incoming, allow_unused=True)
            for out, candidate in ((found, block), (expected, other))
        )
        for key, one, two in zip(["x", *inputs], *gradients, strict=True):
            assert (one is None) == (two is None), f"{name}: {key}"
            if one is not None and two is not None:
                tolerance = 1e-6 * float(two.abs().amax()) + 1e-12
                torch.testing.assert_close(one, two, rtol=0.0, atol=tolerance, msg=f"{name}: {key}")
        for point in ("y", "product", "branch", "gain"):
            one, two = getattr(block, point), getattr(other, point)
            if isinstance(one, ActivationQuantizer):
                torch.testing.assert_close(one.scale, two.scale, rtol=1e-5, atol=0.0)


@torch.no_grad()
def test_a_channel_of_large_gain_and_little_attention_takes_no_steps_from_the_others() -> None:
    float_toy = build_float_toy()
    for block in (m for m in float_toy.modules() if isinstance(m, SubBlock)):
        block.norm2.running_var[0] /= 1e6  # its gain is a thousand times as large
        block.se.se[3].bias[0], block.se.se[3].weight[0] = -6.9, 0.0  # and its attention 1 / 1,000
    model = copy.deepcopy(float_toy)
    prepare(model, Quantization(trunk=TrunkGroup(observer="moving_average")))
    calibrate(model, lambda: model(toy_images()))
    blocks = sub_blocks(model)
    for name, block in blocks:
        gain, _ = folded_batch_norm(block.norm2)
        assert block.gain_step(gain) < largest_gain_step(gain) / 10, name
    reference, found = float_toy(toy_images()), model(toy_images())
    assert signal_to_noise(reference, found) > signal_to_noise(reference, without_own_grid(model)) + 2


def without_own_grid(model: nn.Module) -> Tensor:
    """Logits with a grid that holds the gain at attention 1."""
    other = copy.deepcopy(model)
    for _, block in sub_blocks(other):
        block.gain = Quantizer()
    logits: Tensor = other(toy_images())
    return logits


def test_a_hook_on_a_point_is_given_its_values_though_steps_are_put_together() -> None:
    quantization = Quantization(trunk=TrunkGroup(observer="percentile"))
    model = toy(0, quantization).double().train()
    freeze_observers(model)  # attention's would move on from one pass to the next
    name, block = sub_blocks(model)[0]
    seen: list[Tensor] = []
    handle = block.y.register_forward_hook(lambda module, inputs, output: seen.append(output))
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, block.channels, 6, 6, generator=random, dtype=torch.float64)
    x = block.source.quantizer.requantize(x)
    watched = block(x)
    handle.remove()
    assert len(seen) == 1, name
    torch.testing.assert_close(block(x), watched)
    assert len(seen) == 1


def test_a_normalization_of_one_value_is_refused_as_torch_does_it() -> None:
    model = toy(0, Quantization(trunk=TrunkGroup(observer="percentile"))).train()
    name, block = sub_blocks(model)[0]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.zeros(1, block.channels, 1, 1))
    assert block(torch.zeros(2, block.channels, 1, 1)).isfinite().all(), name
