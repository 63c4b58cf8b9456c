"""Batch normalization with its PReLU equals the two layers, forward and backward."""

import pytest
import torch
from torch import nn

from qat.ops.norm_prelu import norm_prelu
from tests.helpers.gradients import assert_same, gradients, norm, values

pytestmark = pytest.mark.usefixtures("passes")


def test_a_fused_norm_and_prelu_equal_the_two_layers() -> None:
    x, activation = values(4, 3, 5, 6).requires_grad_(), nn.PReLU(3).double()
    with torch.no_grad():
        activation.weight.copy_(torch.tensor([0.25, -0.5, 1.5]))
    fused_norm, plain_norm = norm(3), norm(3)
    fused, plain = norm_prelu(x, fused_norm, activation.weight), activation(plain_norm(x))
    assert_same((fused,), (plain,))
    assert_same(
        gradients(fused, x, fused_norm.weight, fused_norm.bias, activation.weight),
        gradients(plain, x, plain_norm.weight, plain_norm.bias, activation.weight),
    )
    assert_same(tuple(fused_norm.buffers()), tuple(plain_norm.buffers()))
