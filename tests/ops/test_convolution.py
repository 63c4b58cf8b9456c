"""Convolutions of training and of signs equal torch's, whatever way they take."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.native.bindings import torch_alone
from qat.ops.convolution import binary_conv2d, training_conv2d
from qat.ops.winograd import tiny_conv3x3
from tests.helpers.native_passes import need_passes
from tests.helpers.rounding_bounds import assert_within, random_sum_bound, tiny_conv_bounds

Convolve = Callable[..., Tensor]


def plus_or_minus(*shape: int) -> Tensor:
    return (torch.randint(0, 2, shape) * 2 - 1).double()


@pytest.fixture(params=["bfloat16", "widened"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of processors that compute in bfloat16, and that of others."""
    monkeypatch.setattr("qat.ops.bfloat16.lacks_bfloat16", lambda: request.param == "widened")


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 2), (2, 2), (3, 3), (5, 2), (4, 4), (7, 8), (16, 12)]
)
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


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 2), (2, 3), (4, 4), (7, 8)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "zeros"), [(0, False), (3, False), (3, True)])
@pytest.mark.usefixtures("passes")
def test_signs_are_convolved_exactly(
    height: int, width: int, kernel: int, stride: int, dtype: torch.dtype, count: int, zeros: bool
) -> None:
    random = torch.Generator().manual_seed(0)
    signs = torch.randint(-1, 2, (count, 70, height, width), generator=random)
    if not zeros:  # though 0 is a sign, too
        signs = (signs * 2 + 1).sign()
    weight = torch.randint(0, 2, (5, 70, kernel, kernel), generator=random) * 2 - 1
    exact = F.conv2d(signs.double(), weight.double(), stride=stride, padding=kernel // 2)
    ours = binary_conv2d(signs.to(dtype), weight.to(dtype), stride)
    assert ours.dtype == dtype
    assert torch.equal(ours.double(), exact)


def test_autocast_rounds_sums_of_signs_only_once() -> None:
    signs, weight = torch.ones(2, 1024, 2, 2), torch.ones(4, 1024, 3, 3)
    signs[:, ::3], weight[:, ::5] = -1, -1
    exact = F.conv2d(signs, weight, padding=1)
    assert exact.abs().max() > 256
    with torch.autocast("cpu", torch.bfloat16):
        found = binary_conv2d(signs, weight, 1)
    assert torch.equal(found, exact.bfloat16())


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (3, 3), (4, 4), (4, 3), (5, 2)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_in_bfloat16_small_sums_of_signs_and_their_gradients_are_exact(
    height: int, width: int, kernel: int, stride: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, height, width).sign().double().requires_grad_()
    weight = torch.randn(6, 4, kernel, kernel).sign().double().requires_grad_()
    torchs = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
    grad = torch.randint(-2, 3, torchs.shape).double()
    expected = torch.autograd.grad(torchs, (x, weight), grad)
    rough = [one.detach().bfloat16().requires_grad_() for one in (x, weight)]
    ours = training_conv2d(*rough, stride)
    assert torch.equal(ours.double(), torchs)
    for one, other in zip(torch.autograd.grad(ours, rough, grad.bfloat16()), expected, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one.double(), other)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize(("height", "width"), [(1, 5), (2, 2), (4, 4), (6, 7)])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["float64", "bfloat16", "widened"])
@pytest.mark.parametrize("convolve", [training_conv2d, binary_conv2d])
def test_sums_of_signs_have_the_gradients_of_any_convolution(
    height: int,
    width: int,
    kernel: int,
    stride: int,
    kind: str,
    convolve: Convolve,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qat.ops.bfloat16.lacks_bfloat16", lambda: kind == "widened")
    dtype = torch.float64 if kind == "float64" else torch.bfloat16
    torch.manual_seed(0)
    x = plus_or_minus(3, 20, height, width).requires_grad_()
    weight = plus_or_minus(12, 20, kernel, kernel).requires_grad_()
    torchs = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
    grad = torch.randint(-2, 3, torchs.shape).double()
    given = [one.detach().to(dtype).requires_grad_() for one in (x, weight)]
    signs = {"signs": True} if convolve is training_conv2d else {}
    ours = convolve(*given, stride, **signs)
    assert torch.equal(ours.double(), torchs)
    assert ours.is_contiguous()
    for one, other in zip(
        torch.autograd.grad(ours, given, grad.to(dtype)),
        torch.autograd.grad(torchs, (x, weight), grad),
        strict=True,
    ):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_signs_are_kept_only_for_weights_that_learn(frozen: bool) -> None:
    need_passes()
    x = plus_or_minus(2, 8, 4, 4).requires_grad_()
    weight = plus_or_minus(8, 8, 3, 3).requires_grad_(not frozen)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        out = training_conv2d(x, weight, 1, signs=True)
    assert any(one.untyped_storage().nbytes() == x.nbytes for one in kept) != frozen
    out.sum().backward()
    exact = torch.ones_like(x).requires_grad_()
    F.conv2d(exact, weight.detach(), padding=1).sum().backward()
    assert torch.equal(x.grad, exact.grad)
    assert (weight.grad is None) == frozen


@pytest.mark.parametrize(
    ("side", "count", "channels", "signs", "fewer"),
    [
        (1, 1, 4, True, True),
        (2, 1, 4, True, True),
        (4, 32, 256, False, True),
        (4, 32, 256, True, False),  # fractions
        (4, 31, 256, False, False),  # too few images for the weights' transforms
        (4, 32, 255, False, False),
        (3, 32, 256, False, False),
        (5, 32, 256, False, False),
        (7, 32, 256, False, False),
        (8, 32, 256, False, False),
    ],
)
def test_images_of_some_sizes_take_fewer_products(
    side: int, count: int, channels: int, signs: bool, fewer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        "qat.ops.convolution.tiny_conv3x3", lambda x, w: calls.append(x) or tiny_conv3x3(x, w)
    )
    torch.manual_seed(0)
    x, weight = torch.randn(count, channels, side, side).sign(), torch.randn(channels, channels, 3, 3).sign()
    with torch_alone():
        found = training_conv2d(x, weight, 1, signs)
    assert bool(calls) == fewer
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    if signs or not fewer:
        assert torch.equal(found.double(), exact)
    else:
        assert_within(found, exact, tiny_conv_bounds(x, weight, exact, torch.float32)[0])


def test_half_precision_that_has_instructions_never_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat.ops.bfloat16.lacks_bfloat16", lambda: False)
    monkeypatch.setattr("qat.ops.convolution.tiny_conv3x3", None)
    for dtype in (torch.bfloat16, torch.float16):
        x, weight = torch.randn(32, 256, 4, 4, dtype=dtype), torch.randn(256, 256, 3, 3, dtype=dtype)
        assert training_conv2d(x, weight, 1).dtype == dtype


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("side", [2, 4])
def test_a_frozen_weight_gets_no_gradient(side: int) -> None:
    x, weight = torch.randn(2, 4, side, side, requires_grad=True), torch.randn(4, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=side > 2):
        out = training_conv2d(x, weight, 1)
    out.sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("side", [2, 5])
def test_autocast_decides_the_type(side: int) -> None:
    x, weight = torch.randn(2, 4, side, side), torch.randn(4, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = training_conv2d(x, weight, 1)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("side", [1, 2, 4, 7])
def test_widened_sums_and_gradients_are_those_of_float32_rounded_once(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qat.ops.bfloat16.lacks_bfloat16", lambda: True)
    torch.manual_seed(0)
    x = torch.randn(32, 256, side, side).sign().requires_grad_()
    weight = torch.randn(256, 256, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = training_conv2d(x, weight, 1)
    wide = training_conv2d(x, weight, 1)
    grad = torch.randn(ours.shape).bfloat16()
    found = torch.autograd.grad(ours, (x, weight), grad)
    expected = torch.autograd.grad(wide, (x, weight), grad.float())
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, wide.bfloat16())
    assert torch.equal(found[0], expected[0].bfloat16().float())
    # Of weights, which stay float32, neither values nor gradients are rounded.
    assert torch.equal(found[1], expected[1])


def conv(x: Tensor, weight: Tensor) -> Tensor:
    """A 3×3 convolution in float64."""
    return F.conv2d(x.double(), weight.double(), padding=1)


def direct_bounds(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds on errors of that convolution in float32, and of its gradients by ``x`` and ``weight``."""
    squares = [one.detach().double().square().requires_grad_() for one in (x, weight)]
    sums = conv(*squares)
    by_x, by_weight = torch.autograd.grad(sums, squares, grad.double().square())
    # Each term is a product; as many as there are taps of channels or pixels of images are added.
    return (
        random_sum_bound(sums.detach(), 1 + weight[0].numel(), torch.float32),
        random_sum_bound(by_x, 1 + weight[:, 0].numel(), torch.float32),
        random_sum_bound(by_weight, 1 + grad[:, 0].numel(), torch.float32),
    )


@pytest.mark.parametrize("side", [1, 2, 4, 7])
def test_sums_in_float32_and_their_gradients_are_exact_up_to_rounding(side: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 256, side, side).sign().requires_grad_()
    weight = torch.randn(256, 256, 3, 3, requires_grad=True)
    found, exact, grad = training_conv2d(x, weight, 1), conv(x, weight), torch.randn(32, 256, side, side)
    bounds = tiny_conv_bounds(x, weight, grad, torch.float32) if side < 7 else direct_bounds(x, weight, grad)
    for one, other, bound in zip(
        (found, *torch.autograd.grad(found, (x, weight), grad)),
        (exact, *torch.autograd.grad(exact, (x, weight), grad.double())),
        bounds,
        strict=True,
    ):
        assert_within(one, other, bound)
