"""Autocast to bfloat16 where a processor has no instructions for it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.ops.bfloat16 import emulated_autocast, is_emulated

CPU = torch.device("cpu")


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_sums_rounded_factors_and_rounds_once(stride: int) -> None:
    layer, x = nn.Conv2d(6, 5, 3, stride=stride, padding=1), torch.randn(2, 6, 9, 9)
    with emulated_autocast():
        found = layer(x)
    assert found.dtype == torch.bfloat16
    bias = rounded(layer.bias.detach())
    exact = F.conv2d(rounded(x), rounded(layer.weight.detach()), bias, stride, 1)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def test_a_linear_layer_does_so_by_name_too_and_has_gradients_in_float32() -> None:
    weight, x = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7)
    with emulated_autocast():
        found = F.linear(x, weight=weight)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.double(), rounded(x) @ rounded(weight.detach()).t(), rtol=2**-8, atol=1e-5
    )
    found.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad.double(), rounded(x).sum(0).expand(5, 7), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    "multiply",
    [torch.matmul, torch.mm, Tensor.matmul, lambda a, b: a @ b, lambda a, b: torch.bmm(a[None], b[None])[0]],
)
def test_matrix_products_do_so_too(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = torch.randn(5, 600), torch.randn(600, 7)
    with emulated_autocast():
        found = multiply(a, b)
    assert found.dtype == torch.bfloat16
    # Of emulated sums many are rounded more than once.
    assert torch.equal(found, (a.bfloat16().float() @ b.bfloat16().float()).bfloat16())


def test_attention_of_a_teacher_does_so_too() -> None:
    query, key, value = (torch.randn(2, 3, 9, 16) for _ in "qkv")
    mask = torch.rand(9, 9) > 0.3
    with emulated_autocast():
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    exact = F.scaled_dot_product_attention(*map(rounded, (query, key, value)), attn_mask=mask)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float64, torch.int64])
def test_what_autocast_leaves_alone_is_left_alone(kind: torch.dtype) -> None:
    a = torch.arange(300, 316).view(4, 4).to(kind)
    with emulated_autocast():
        found = a @ a
    assert found.dtype == kind
    assert torch.equal(found, (a.double() @ a.double()).to(kind))
    assert not torch.equal(found.double(), rounded(a) @ rounded(a))


def test_other_operators_and_what_comes_after_are_left_alone() -> None:
    a = torch.randn(4, 4)
    with emulated_autocast():
        assert (a + a).dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(F.linear(a, a), a @ a.t())
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(F.linear(a, a), a @ a.t())


def test_an_error_inside_ends_it() -> None:
    def fail_inside() -> None:
        with emulated_autocast():
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert not torch.is_autocast_enabled("cpu")
    assert F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_only_bfloat16_on_such_a_processor_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    for lacks in (False, True):
        monkeypatch.setattr("qat.ops.bfloat16.lacks_bfloat16", lambda lacks=lacks: lacks)
        assert is_emulated(CPU, torch.bfloat16) == lacks
        assert not is_emulated(CPU, torch.float16)
        assert not is_emulated(CPU, torch.float32)
        assert not is_emulated(torch.device("cuda"), torch.bfloat16)
