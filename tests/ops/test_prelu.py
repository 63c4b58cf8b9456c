"""PReLU equals torch's, forward and backward."""

import pytest
import torch
from torch import nn

from qat.ops.prelu import prelu
from tests.helpers.gradients import assert_same, gradients, values

pytestmark = pytest.mark.usefixtures("passes")


def test_prelu_equals_torchs_at_zero_too() -> None:
    x, activation = values(2, 3, 4, 4).requires_grad_(), nn.PReLU(3).double()
    with torch.no_grad():
        x[:, :, 0, 0] = 0.0
    assert torch.equal(prelu(x, activation.weight), activation(x))
    assert_same(
        gradients(prelu(x, activation.weight), x, activation.weight),
        gradients(activation(x), x, activation.weight),
    )
