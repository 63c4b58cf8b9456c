"""The fused steps of training equal the plain formulas, forward and backward."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from rounding_bounds import assert_within, gamma
from torch import Tensor, nn

from qat.binary import binarize_activation
from qat.fused import affine_form, can_fuse, norm_prelu, prelu, scaled, scaled_norm, shifted_sign
from qat.layers import SubBlock
from qat.pooling import moments

pytestmark = pytest.mark.usefixtures("passes")


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels).double()
    with torch.no_grad():
        layer.weight.copy_(values(channels, seed=1))
        layer.bias.copy_(values(channels, seed=2))
    return layer


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * values(*out.shape, seed=9)).sum(), inputs)


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


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


def test_a_fused_norm_and_prelu_equal_the_two_layers() -> None:
    x, activation = values(4, 3, 5, 6).requires_grad_(), nn.PReLU(3).double()
    with torch.no_grad():
        activation.weight.copy_(torch.tensor([0.25, -0.5, 1.5]))
    fused_norm, plain_norm = norm(3), norm(3)
    fused, plain = norm_prelu(x, fused_norm, activation), activation(plain_norm(x))
    assert_same((fused,), (plain,))
    assert_same(
        gradients(fused, x, fused_norm.weight, fused_norm.bias, activation.weight),
        gradients(plain, x, plain_norm.weight, plain_norm.bias, activation.weight),
    )
    assert_same(tuple(fused_norm.buffers()), tuple(plain_norm.buffers()))


def test_prelu_equals_torchs_at_zero_too() -> None:
    x, activation = values(2, 3, 4, 4).requires_grad_(), nn.PReLU(3).double()
    with torch.no_grad():
        x[:, :, 0, 0] = 0.0
    assert torch.equal(prelu(x, activation.weight), activation(x))
    assert_same(
        gradients(prelu(x, activation.weight), x, activation.weight),
        gradients(activation(x), x, activation.weight),
    )


def test_a_scaled_norm_equals_the_norm_of_the_product() -> None:
    x, residual = values(4, 3, 5, 5).requires_grad_(), values(4, 3, 5, 5, seed=3).requires_grad_()
    factor = values(4, 3, seed=4).sigmoid().requires_grad_()
    fused_norm, plain_norm = norm(3), norm(3)
    fused = scaled_norm(x, factor, *moments(x), fused_norm, residual)
    plain = plain_norm(factor[..., None, None] * x) + residual
    assert_same((fused,), (plain,))
    assert_same(
        gradients(fused, x, factor, residual, fused_norm.weight, fused_norm.bias),
        gradients(plain, x, factor, residual, plain_norm.weight, plain_norm.bias),
    )
    assert_same(tuple(fused_norm.buffers()), tuple(plain_norm.buffers()))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (1, 3, 1, 2)])
def test_the_affine_form_of_a_norm_equals_torchs_and_counts_its_batch(
    shape: tuple[int, ...], momentum: float | None
) -> None:
    x = values(*shape).requires_grad_()
    ours, plain = norm(3), norm(3)
    ours.momentum = plain.momentum = momentum
    factor = torch.ones(shape[:2], dtype=torch.float64)
    for _ in range(2):
        gain, offset = affine_form(ours, factor, *moments(x), x[0, 0].numel())
        found, expected = gain.view(-1, 1, 1) * x + offset.view(-1, 1, 1), plain(x)
    assert_same((found,), (expected,))
    assert_same(gradients(found, x, ours.weight, ours.bias), gradients(expected, x, plain.weight, plain.bias))
    for mine, torchs in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-6, atol=1e-7)  # a float32 moment of the average


@pytest.mark.parametrize("images", [4, 1])
def test_scaling_equals_a_product_for_images_that_share_a_factor_too(images: int) -> None:
    x, factor = values(4, 3, 5, 5).requires_grad_(), values(images, 3, seed=4).requires_grad_()
    fused, plain = scaled(x, factor), x * factor[..., None, None]
    assert torch.equal(fused, plain)
    assert_same(gradients(fused, x, factor), gradients(plain, x, factor))


@pytest.mark.parametrize(
    ("kernel", "stride", "kind", "recoupling"),
    [
        (k, s, kind, recoupling)
        for k, s, kind, recoupling in itertools.product((1, 3), (1, 2), ("scale", "bias"), (True, False))
        if k == 3 or (s == 1 and kind == "bias")
    ],
)
@pytest.mark.parametrize("side", [2, 7])
def test_a_fused_sub_block_equals_the_plain_one(
    kernel: int, stride: int, kind: str, recoupling: bool, side: int
) -> None:
    torch.manual_seed(0)
    fused = SubBlock(16, kernel, stride, kind, recoupling).double()  # type: ignore[arg-type]  # parametrized
    plain = SubBlock(16, kernel, stride, kind, recoupling).double()  # type: ignore[arg-type]
    plain.load_state_dict(fused.state_dict())
    # Without a moving average nothing is fused; the batch statistics are the same.
    plain.norm1.momentum = plain.norm2.momentum = None
    assert can_fuse(fused.norm1)
    assert not can_fuse(plain.norm1)
    x = values(4, 16, side, side).requires_grad_()
    one, other = fused(x), plain(x)
    assert_same((one,), (other,))
    used = [name for name, _ in fused.named_parameters()]
    if kind == "bias":
        used.remove("activation1.weight")
    if kind == "bias" and not recoupling:
        used = [name for name in used if not name.startswith("norm2")]
    assert_same(
        gradients(one, x, *(fused.get_parameter(name) for name in used)),
        gradients(other, x, *(plain.get_parameter(name) for name in used)),
    )


def test_half_precision_stays_near_float32() -> None:
    torch.manual_seed(0)
    block = SubBlock(32, 3, 1, "bias")
    x = torch.randn(8, 32, 8, 8)
    exact = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = block(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    # A value next to a threshold may change its sign: most must agree, not all.
    near = (rough.float() - exact).abs() < 0.05 * exact.abs().amax()
    assert float(near.float().mean()) > 0.97
    rough.float().square().mean().backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in block.parameters())


def test_statistics_survive_a_large_mean() -> None:
    # A difference of E[x²] and E[x]² would lose every digit here.
    x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0)) * 1e-2 + 100.0
    layer = nn.BatchNorm2d(4)
    fused = scaled_norm(x, torch.ones(8, 4), *moments(x), layer, torch.zeros_like(x))
    plain = F.batch_norm(x.double(), None, None, layer.weight.double(), layer.bias.double(), True)
    # The mean is a sum of 36 pixels, then of 8 images, divided twice; gain · x + offset takes four more.
    largest = x.abs().amax().double() / x.double().std((0, 2, 3), correction=0).amin()
    assert_within(fused, plain, largest * (gamma(36 + 8 + 2, torch.float32) + 2 * gamma(4, torch.float32)))


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_a_bias_gets_the_sum_of_all_images_whatever_their_size(side: int) -> None:
    x, bias = values(5, 4, side, side).float(), torch.zeros(1, 4, 1, 1, requires_grad=True)
    (found,) = torch.autograd.grad(shifted_sign(x, bias).sum(), bias)
    torch.testing.assert_close(found.flatten(), (x.abs() < 1.5).float().sum((0, 2, 3)))
