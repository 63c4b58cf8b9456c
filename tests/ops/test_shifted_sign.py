"""The sign of a sum with a bias equals the plain formula, forward and backward."""

import pytest
import torch

from qat.ops.binary import binarize_activation, shifted_sign
from tests.helpers.gradients import assert_same, gradients, values

pytestmark = pytest.mark.usefixtures("passes")


@pytest.mark.parametrize("zero_is_positive", [False, True])
def test_a_shifted_sign_is_the_sign_of_the_sum(zero_is_positive: bool) -> None:
    x, bias = values(3, 4, 5, 5).mul(2).requires_grad_(), values(1, 4, 1, 1, seed=1).requires_grad_()
    with torch.no_grad():
        x[0, 0, 0, 0] = -bias[0, 0]  # the sum is 0
        x[0, 1, 0, 0], x[0, 1, 0, 1] = 1.5 - bias[0, 1], -1.5 - bias[0, 1]  # the gradient ends here
    fused = shifted_sign(x, bias, zero_is_positive)
    plain = binarize_activation(x + bias, zero_is_positive)
    assert torch.equal(fused, plain)
    assert_same(gradients(fused, x, bias), gradients(plain, x, bias))


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_a_bias_gets_the_sum_of_all_images_whatever_their_size(side: int) -> None:
    x, bias = values(5, 4, side, side).float(), torch.zeros(1, 4, 1, 1, requires_grad=True)
    (found,) = torch.autograd.grad(shifted_sign(x, bias).sum(), bias)
    torch.testing.assert_close(found.flatten(), (x.abs() < 1.5).float().sum((0, 2, 3)))
