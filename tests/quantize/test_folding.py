"""Folded batch normalization, and constants that have few bits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qat.models.bnext import BNext
from qat.ops.batch_norm import folded_batch_norm
from qat.quantize.dyadic import LARGEST_SHIFT
from qat.quantize.folding import gain_scale, largest_gain_step, product_scale, quantized_slope, slope_scale
from qat.quantize.sub_block import FakeQuantSubBlock
from tests.helpers.prepared_networks import fake_quantized_sub_blocks

POSITIVE = st.floats(2.0**-13, 2.0**13, width=32)


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (1, 3, 1, 2)])
def test_a_folded_batch_norm_equals_torch_in_values_and_gradients(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(3).double().eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(3, generator=random, dtype=torch.float64) + 0.2)
    ours = copy.deepcopy(norm)
    x = (3 * torch.randn(shape, generator=random, dtype=torch.float64) + 1).requires_grad_()
    copied = x.detach().clone().requires_grad_()
    incoming = torch.randn(shape, generator=random, dtype=torch.float64)

    gain, offset = folded_batch_norm(ours)
    assert gain.shape == offset.shape == (3,)
    expected, found = norm(x), gain.view(-1, 1, 1) * copied + offset.view(-1, 1, 1)
    expected.backward(incoming)
    found.backward(incoming)

    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(copied.grad, x.grad, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(ours.weight.grad, norm.weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.bias.grad, norm.bias.grad, rtol=1e-9, atol=1e-9)


def assert_few_bits(ratio: float) -> None:
    """Whether ``ratio`` has at most 10 significant bits, up to rounding in float32."""
    mantissa, _ = math.frexp(ratio)
    assert abs(mantissa * 1024 - round(mantissa * 1024)) < 1024 * 2**-21


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6))
def test_slopes_lie_on_an_8_bit_grid_of_the_smallest_power_of_two(slopes: list[float]) -> None:
    slope = torch.tensor(slopes)
    scale = slope_scale(slope).item()
    assert math.frexp(scale)[0] == 0.5
    assert scale >= 2.0**-14
    assert max(map(abs, slopes)) <= 127 * scale
    assert scale == 2.0**-14 or max(map(abs, slopes)) > 127 * scale / 2 * (1 - 1e-6)
    on_grid = quantized_slope(slope)
    assert torch.equal(on_grid / scale, (on_grid / scale).round())
    assert (on_grid - slope).abs().max() <= scale / 2


def test_slopes_pass_their_gradient_straight_through() -> None:
    slope = torch.tensor([-0.3, 0.0, 0.25, 1.0], requires_grad=True)
    quantized_slope(slope).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert slope.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=4), POSITIVE, POSITIVE)
def test_the_gain_s_grid_holds_it_and_reaches_the_product_in_few_bits(
    gains: list[float], y: float, product: float
) -> None:
    gain = torch.tensor(gains).view(1, -1, 1, 1)
    y_scale, product_step = torch.tensor(y), torch.tensor(product)
    scale = gain_scale(largest_gain_step(gain), y_scale, product_step)
    largest = max(gain.abs().max().item(), 1e-20)
    # By 10 bits, or by one unit of the largest shift where the multiplier is tiny.
    unit = 2.0**-LARGEST_SHIFT * product_step.item() / y_scale.item()
    assert largest / 127 * (1 - 1e-6) <= scale.item() <= (largest / 127 * (1 + 2**-9) + unit) * (1 + 1e-6)
    if largest > 1e-12:
        assert_few_bits(scale.item() * y_scale.item() / product_step.item())


@given(POSITIVE, POSITIVE, POSITIVE)
def test_the_product_s_grid_is_raised_a_little_and_reaches_the_branch_in_few_bits(
    product: float, residual: float, branch: float
) -> None:
    scales = torch.tensor(product), torch.tensor(residual), torch.tensor(branch)
    found = product_scale(*scales).item()
    unit = 2.0**-LARGEST_SHIFT * scales[2].item() / scales[1].item()
    assert scales[0].item() * (1 - 1e-6) <= found <= (scales[0].item() * (1 + 2**-9) + unit) * (1 + 1e-6)
    assert_few_bits(found * scales[1].item() / scales[2].item())


def test_the_multipliers_of_a_calibrated_network_have_few_bits(toy: BNext) -> None:
    for block in fake_quantized_sub_blocks(toy).values():
        assert isinstance(block, FakeQuantSubBlock)
        gain, _ = folded_batch_norm(block.norm2)
        step = block.branch.scale
        if block.kind == "scale":
            step = block.product_step()
            assert_few_bits(float(step * block.source.quantizer.scale / block.branch.scale))
        assert_few_bits(float(block.gain_step(gain) * block.y.scale / step))
