"""Convolutions with fewer products equal torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.ops import winograd
from qat.ops.winograd import are_exact, has_transforms, tiny_conv3x3, transforms
from tests.helpers.rounding_bounds import assert_within, tiny_conv_bounds

SIDES = (1, 2, 4)


def direct(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("height", SIDES)
@pytest.mark.parametrize("width", SIDES)
@pytest.mark.parametrize(("count", "channels", "outputs"), [(3, 5, 37), (1, 1, 1), (7, 16, 32)])
@pytest.mark.parametrize("chunk", [1, winograd.CHUNK])  # 16 output channels at once, all
def test_values_and_gradients_are_those_of_a_direct_convolution(
    height: int,
    width: int,
    count: int,
    channels: int,
    outputs: int,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(winograd, "CHUNK", chunk)
    x, weight = images(count, channels, height, width), images(outputs, channels, 3, 3)
    ours, torchs = tiny_conv3x3(x, weight), direct(x, weight)
    torch.testing.assert_close(ours, torchs, rtol=1e-11, atol=1e-11)
    assert ours.is_contiguous()
    grad = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, (x, weight), grad),
        torch.autograd.grad(torchs, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
        assert one.is_contiguous()


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 4), (4, 1)])
def test_gradients_are_those_of_differences(height: int, width: int) -> None:
    assert torch.autograd.gradcheck(tiny_conv3x3, (images(2, 2, height, width), images(3, 2, 3, 3)))


def test_tensors_that_lie_otherwise_in_memory_are_taken() -> None:
    x = images(3, 4, 4, 4).detach().to(memory_format=torch.channels_last).requires_grad_()
    weight = images(4, 3, 3, 3).detach().permute(1, 0, 3, 2).requires_grad_()
    ours, torchs = tiny_conv3x3(x, weight), direct(x, weight)
    grad = torch.randn_like(torchs).expand(2, -1, -1, -1, -1)[0].transpose(2, 3)
    for one, other in zip(
        torch.autograd.grad(ours, (x, weight), grad),
        torch.autograd.grad(torchs, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("side", SIDES)
def test_no_images_have_no_values_and_gradients_of_zero(side: int) -> None:
    x, weight = images(0, 4, side, side), images(6, 4, 3, 3)
    out = tiny_conv3x3(x, weight)
    assert out.shape == (0, 6, side, side)
    grad_x, grad_weight = torch.autograd.grad(out, (x, weight), torch.zeros_like(out))
    assert grad_x.shape == x.shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_gradient_that_nobody_wants_is_not_computed(frozen: int) -> None:
    inputs = [images(2, 3, 4, 4), images(3, 3, 3, 3)]
    expected = torch.autograd.grad(direct(*inputs).sum(), inputs)[1 - frozen]
    inputs[frozen].requires_grad_(False)
    tiny_conv3x3(*inputs).sum().backward()
    assert inputs[frozen].grad is None
    torch.testing.assert_close(inputs[1 - frozen].grad, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_sums_of_signs_are_exact_integers_where_transforms_are(height: int, width: int) -> None:
    assert are_exact(height, width)
    x, weight = torch.randn(5, 200, height, width).sign(), torch.randn(64, 200, 3, 3).sign()
    assert torch.equal(tiny_conv3x3(x, weight).double(), direct(x.double(), weight.double()))


@pytest.mark.parametrize("side", SIDES)
def test_rounding_errors_stay_within_those_of_the_transforms(side: int) -> None:
    """Each of them, and their root mean square, which is 0.2 to 0.3 of its bound whatever adds the terms."""
    x, weight = torch.randn(32, 128, side, side).sign(), torch.randn(128, 128, 3, 3)
    grad = torch.randn(32, 128, side, side)
    rough = [x.requires_grad_(), weight.requires_grad_()]
    exact = [one.detach().double().requires_grad_() for one in rough]
    ours, torchs = tiny_conv3x3(*rough), direct(*exact)
    pairs = [(ours, torchs)]
    pairs += zip(
        torch.autograd.grad(ours, rough, grad), torch.autograd.grad(torchs, exact, grad.double()), strict=True
    )
    bounds = tiny_conv_bounds(x, weight, grad, torch.float32)
    roots = tiny_conv_bounds(x, weight, grad, torch.float32, deviations=1.0)
    for (one, other), bound, root in zip(pairs, bounds, roots, strict=True):
        assert_within(one, other, bound)
        assert (one.double() - other).norm() < root.norm()


def test_the_same_step_gives_the_same_bits() -> None:
    x, weight = torch.randn(33, 40, 4, 4, requires_grad=True), torch.randn(70, 40, 3, 3, requires_grad=True)
    grad = torch.randn(33, 70, 4, 4)
    first, second = (
        (out.detach(), *torch.autograd.grad(out, (x, weight), grad))
        for out in (tiny_conv3x3(x, weight) for _ in range(2))
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("side", "products"), [(1, 1), (2, 9), (4, 36)])
def test_products_are_fewer_than_those_of_pixels_and_taps(side: int, products: int) -> None:
    assert len(transforms(side, side, torch.float32).weights) == products


def test_other_sizes_have_no_transforms() -> None:
    assert not has_transforms(3, 3)
    assert not has_transforms(2, 5)
    assert not has_transforms(8, 8)
