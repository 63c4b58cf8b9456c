"""The end of a sub-block equals its formula, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qat.ops.pooling import moments
from qat.ops.scale_add import scaled, scaled_norm_add
from tests.helpers.gradients import assert_same, gradients, norm, values

pytestmark = pytest.mark.usefixtures("passes")


def test_a_scaled_norm_equals_the_norm_of_the_product() -> None:
    x, residual = values(4, 3, 5, 5).requires_grad_(), values(4, 3, 5, 5, seed=3).requires_grad_()
    factor = values(4, 3, seed=4).sigmoid().requires_grad_()
    fused_norm, plain_norm = norm(3), norm(3)
    fused = scaled_norm_add(x, factor, *moments(x), fused_norm, residual)
    plain = plain_norm(factor[..., None, None] * x) + residual
    assert_same((fused,), (plain,))
    assert_same(
        gradients(fused, x, factor, residual, fused_norm.weight, fused_norm.bias),
        gradients(plain, x, factor, residual, plain_norm.weight, plain_norm.bias),
    )
    assert_same(tuple(fused_norm.buffers()), tuple(plain_norm.buffers()))


@pytest.mark.parametrize("images", [4, 1])
def test_scaling_equals_a_product_for_images_that_share_a_factor_too(images: int) -> None:
    x, factor = values(4, 3, 5, 5).requires_grad_(), values(images, 3, seed=4).requires_grad_()
    fused, plain = scaled(x, factor), x * factor[..., None, None]
    assert torch.equal(fused, plain)
    assert_same(gradients(fused, x, factor), gradients(plain, x, factor))


def test_statistics_survive_a_large_mean() -> None:
    # A difference of E[x²] and E[x]² would lose every digit here.
    x = torch.randn(8, 4, 6, 6) * 1e-2 + 100.0
    layer = nn.BatchNorm2d(4)
    fused = scaled_norm_add(x, torch.ones(8, 4), *moments(x), layer, torch.zeros_like(x))
    plain = F.batch_norm(x.double(), None, None, layer.weight.double(), layer.bias.double(), True)
    assert float((fused - plain).detach().abs().max()) < 0.05
