"""Means, moments and pooling equal torch's, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.ops.pooling import NARROW, moments, pool2x2, spatial_mean
from tests.helpers.gradients import assert_same, gradients, values


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("side", [1, 4])
def test_moments_are_mean_and_variance_of_each_image_and_channel(side: int) -> None:
    x = values(3, 2, side, side).add(5.0).requires_grad_()
    mean, variance = moments(x)
    assert_same((mean, variance), (x.mean((2, 3)), x.var((2, 3), correction=0)))
    total = mean * values(3, 2, seed=4) + variance * values(3, 2, seed=5)
    plain = x.mean((2, 3)) * values(3, 2, seed=4) + x.var((2, 3), correction=0) * values(3, 2, seed=5)
    assert_same(gradients(total, x), gradients(plain, x))


@pytest.mark.parametrize(
    "shape", [(2, 3, 2, 2), (3, 2, 4, 8), (2, 2, 6, NARROW), (1, 2, 2, NARROW + 2), (0, 3, 4, 4)]
)
@pytest.mark.parametrize("contiguous", [True, False])
def test_pooling_of_narrow_and_wide_images_is_torchs(shape: tuple[int, ...], contiguous: bool) -> None:
    x = values(*shape).requires_grad_()
    given = x if contiguous else x.mT.contiguous().mT
    fused, plain = pool2x2(given), F.avg_pool2d(x, 2)
    assert_same((fused, *gradients(fused, x)), (plain, *gradients(plain, x)))


def test_pooling_of_integers_and_of_half_precision_has_torchs_bits() -> None:
    integers = values(4, 8, 16, 16).mul(40).round().float()
    assert torch.equal(pool2x2(integers), F.avg_pool2d(integers, 2))
    half = values(4, 8, 16, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool2x2(half), F.avg_pool2d(half, 2))
        single = values(4, 8, 16, 16).float()
        assert pool2x2(single).dtype == torch.float32  # autocast leaves it alone
        torch.testing.assert_close(pool2x2(single), F.avg_pool2d(single, 2))


@pytest.mark.parametrize("side", [1, 2, 4, 9])
def test_means_over_an_image_are_torchs(side: int) -> None:
    x = values(3, 4, side, side).requires_grad_()
    fused, plain = spatial_mean(x), x.mean((2, 3))
    assert_same((fused, *gradients(fused, x)), (plain, *gradients(plain, x)))


def test_a_mean_keeps_no_image_for_its_gradient() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        spatial_mean(values(2, 3, 4, 4).requires_grad_())
    assert not kept


def test_pooling_of_odd_sides_leaves_the_last_row_out_as_torchs_does() -> None:
    x = values(2, 3, 5, 4)
    assert torch.equal(pool2x2(x), F.avg_pool2d(x, 2))
