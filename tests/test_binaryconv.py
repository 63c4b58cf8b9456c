"""The convolution of a training step equals torch's, whatever way it takes."""

import pytest
import torch
import torch.nn.functional as F

from qat.binaryconv import training_conv2d


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (5, 2)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_values_and_gradients_are_those_of_conv2d(height: int, width: int, kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, kernel, kernel, dtype=torch.float64, requires_grad=True)
    ours = training_conv2d(x, weight, stride)
    torchs = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, (x, weight), grad),
        torch.autograd.grad(torchs, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_sums_of_signs_are_exact_integers() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64, 2, 2).sign(), torch.randn(64, 64, 3, 3).sign()
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert torch.equal(training_conv2d(x, weight, 1).double(), exact)


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(2, 4, 2, 2, requires_grad=True), torch.randn(4, 4, 3, 3)
    training_conv2d(x, weight, 1).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_autocast_decides_the_type() -> None:
    x, weight = torch.randn(2, 4, 2, 2), torch.randn(4, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = training_conv2d(x, weight, 1)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
