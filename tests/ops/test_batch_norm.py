"""Gain and offset of a batch normalization equal torch's layer."""

import pytest
import torch

from qat.ops.batch_norm import batch_gain_and_offset
from qat.ops.pooling import moments
from tests.helpers.gradients import assert_same, gradients, norm, values

pytestmark = pytest.mark.usefixtures("passes")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (1, 3, 1, 2)])
def test_gain_and_offset_of_a_norm_equal_torchs_and_counts_its_batch(
    shape: tuple[int, ...], momentum: float | None
) -> None:
    x = values(*shape).requires_grad_()
    ours, plain = norm(3), norm(3)
    ours.momentum = plain.momentum = momentum
    factor = torch.ones(shape[:2], dtype=torch.float64)
    for _ in range(2):
        gain, offset = batch_gain_and_offset(ours, factor, *moments(x), x[0, 0].numel())
        found, expected = gain.view(-1, 1, 1) * x + offset.view(-1, 1, 1), plain(x)
    assert_same((found,), (expected,))
    assert_same(gradients(found, x, ours.weight, ours.bias), gradients(expected, x, plain.weight, plain.bias))
    for mine, torchs in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-6, atol=1e-7)  # a float32 moment of the average
