from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qat.ops.binary import (
    ACTIVATION_CLIP,
    BINARY_TEMPERATURE,
    binarize_activation,
    binarize_weight,
    sign,
)

FINITE = st.floats(-1e6, 1e6, allow_nan=False)
VECTORS = hnp.arrays("float64", st.integers(1, 12), elements=FINITE)


def gradient(function: object, x: Tensor, incoming: Tensor) -> Tensor:
    """What ``function`` passes back for ``incoming``."""
    x = x.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(function(x), x, incoming)  # type: ignore[operator]
    return result


@given(VECTORS)
def test_sign_is_plus_or_minus_one_and_never_zero(values: object) -> None:
    x = torch.from_numpy(values)
    assert torch.equal(sign(x).abs(), torch.ones_like(x))
    assert torch.equal(sign(x) > 0, x >= 0)


def test_sign_of_both_zeros_is_plus_one() -> None:
    assert sign(torch.tensor([0.0, -0.0, -1e-45])).tolist() == [1.0, 1.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sign_keeps_shape_and_type(dtype: torch.dtype) -> None:
    result = sign(torch.randn(2, 3, dtype=dtype))
    assert (result.dtype, result.shape) == (dtype, (2, 3))


@pytest.mark.parametrize(("zero_is_positive", "at_zero"), [(False, 0.0), (True, 1.0)])
def test_the_sign_of_zero_follows_the_mode(zero_is_positive: bool, at_zero: float) -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0])
    assert binarize_activation(x, zero_is_positive).tolist() == [-1.0, at_zero, at_zero, 1.0]


def test_the_float_rule_for_zero_is_the_default() -> None:
    assert binarize_activation(torch.zeros(1)).item() == 0.0


@given(VECTORS, st.booleans())
def test_an_activation_passes_its_gradient_inside_the_clip_only(
    values: object, zero_is_positive: bool
) -> None:
    x = torch.from_numpy(values)
    incoming = torch.arange(1.0, len(x) + 1, dtype=x.dtype)
    passed = gradient(lambda v: binarize_activation(v, zero_is_positive), x, incoming)
    assert torch.equal(passed, torch.where(x.abs() < 1.5, incoming, 0.0))


def test_the_gradient_clip_excludes_its_ends() -> None:
    end = torch.tensor(ACTIVATION_CLIP)
    below = torch.nextafter(end, torch.tensor(0.0))
    x = torch.stack([-end, -below, below, end])
    assert gradient(binarize_activation, x, torch.ones(4)).tolist() == [0.0, 1.0, 1.0, 0.0]


@given(VECTORS, st.floats(BINARY_TEMPERATURE, 2.0))
def test_warm_weights_are_clamped_quotients(values: object, temperature: float) -> None:
    weight = torch.from_numpy(values)
    expected = [min(max(value / temperature, -1.0), 1.0) for value in weight.tolist()]
    assert binarize_weight(weight, temperature).tolist() == expected


@pytest.mark.parametrize("temperature", [1e-8, BINARY_TEMPERATURE * (1 - 1e-12)])
def test_below_the_threshold_weights_are_exactly_one_bit(temperature: float) -> None:
    weight = torch.tensor([-1.4, -1e-30, -0.0, 0.0, 1e-30, 0.2])
    assert binarize_weight(weight, temperature).tolist() == [-1, -1, 1, 1, 1, 1]


def test_at_the_threshold_weights_are_still_quotients() -> None:
    weight = torch.tensor([BINARY_TEMPERATURE / 2, 0.0], dtype=torch.float64)
    assert binarize_weight(weight, BINARY_TEMPERATURE).tolist() == [0.5, 0.0]


@given(VECTORS, st.sampled_from([1e-8, 0.3, 1.0]))
def test_a_weight_gets_the_whole_gradient_at_any_temperature(values: object, temperature: float) -> None:
    weight = torch.from_numpy(values)
    incoming = torch.arange(1.0, len(weight) + 1, dtype=weight.dtype)
    assert torch.equal(gradient(lambda w: binarize_weight(w, temperature), weight, incoming), incoming)


def test_binarizing_leaves_the_latent_weights_alone() -> None:
    weight = torch.tensor([-3.0, 0.2])
    binarize_weight(weight, 0.5)
    binarize_weight(weight, 1e-8)
    assert weight.tolist() == [-3.0, torch.tensor(0.2).item()]
