"""Rounding onto a grid equals torch's fake quantization, values and gradients, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.native.bindings import torch_alone
from qat.ops.fake_quantize import fake_quantize

#: Bits, and whether both signs are taken.
RANGES = [(8, True), (8, False), (2, True), (16, True)]


def torchs(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    zero = torch.zeros(1, dtype=torch.int32)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, low, high)


def values(spread: float, scale: float) -> Tensor:
    """Random numbers, ties between two steps, and the ends of the ranges."""
    random = spread * torch.randn(400, generator=torch.Generator().manual_seed(0))
    ties = scale * (torch.arange(-300, 300) + 0.5)
    ends = scale * torch.tensor([-128.5, -128.4, -128.0, 127.0, 127.4, 127.5, 254.9, 255.5, 0.0, -0.0])
    return torch.cat([random, ties, ends])


# By the native library where it can, which hypothesis lets no fixture choose.
@pytest.mark.parametrize("native", [True, False])
@given(
    st.sampled_from(RANGES),
    st.floats(2.0**-20, 8.0, width=32),
    st.floats(0.01, 50),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_it_equals_torchs_fake_quantization(
    native: bool, integers: tuple[int, bool], step: float, spread: float, overwrite: bool, kind: torch.dtype
) -> None:
    x, scale = values(spread, step).to(kind).requires_grad_(), torch.tensor([step])
    incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=kind)
    expected = torchs(x, scale, *integers)
    with nullcontext() if native else torch_alone():
        found = fake_quantize(x * 1.0, scale, *integers, overwrite=overwrite)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(out, x, incoming)[0] for out in (found, expected)))


@pytest.mark.parametrize("integers", RANGES)
@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
def test_known_extremes_change_nothing(integers: tuple[int, bool], spread: float) -> None:
    x, scale = values(spread, 0.03).requires_grad_(), torch.tensor([0.03])
    found = fake_quantize(x, scale, *integers, extremes=torch.aminmax(x.detach()))
    assert torch.equal(found, fake_quantize(x, scale, *integers))
    gradient, expected = (
        torch.autograd.grad(out.sum(), x)[0] for out in (found, torchs(x, scale, *integers))
    )
    assert torch.equal(gradient, expected)


def test_it_takes_the_memory_of_its_input_where_it_may() -> None:
    x, scale = values(1.0, 0.03), torch.tensor([0.03])
    copy = x.clone()
    assert fake_quantize(x, scale, 8, True).data_ptr() != x.data_ptr()
    assert torch.equal(x, copy)
    assert fake_quantize(x, scale, 8, True, overwrite=True).data_ptr() == x.data_ptr()


def test_a_parameter_is_never_overwritten() -> None:
    weight, scale = torch.nn.Parameter(values(1.0, 0.03)), torch.tensor([0.03])
    before = weight.detach().clone()
    fake_quantize(weight, scale, 8, True, overwrite=True).sum().backward()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("x", [torch.empty(0), torch.empty(2, 0, 3)])
def test_nothing_stays_nothing(x: Tensor) -> None:
    assert fake_quantize(x, torch.tensor([0.03]), 8, True).shape == x.shape


def test_what_is_no_number_stays_so() -> None:
    x = torch.tensor([float("nan"), 1.0])
    assert torch.equal(fake_quantize(x, torch.tensor([0.5]), 8, True).isnan(), x.isnan())
