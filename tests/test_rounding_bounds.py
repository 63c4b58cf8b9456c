"""The bounds hold for sums in any order, and are tight enough to show errors other than rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qat.ops.winograd import tiny_conv3x3
from tests.helpers.rounding_bounds import (
    assert_within,
    gamma,
    random_sum_bound,
    rounded_bound,
    sum_bound,
    tiny_conv_bounds,
    unit_roundoff,
)

KINDS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(terms: Tensor) -> Tensor:
    """Sum of the last axis, each term added to all before it and rounded."""
    total = torch.zeros_like(terms[..., 0])
    for term in terms.unbind(-1):
        total = total + term
    return total


@pytest.mark.parametrize(("kind", "digits"), KINDS.items(), ids=str)
def test_the_unit_roundoff_is_the_largest_relative_error_of_rounding(kind: torch.dtype, digits: int) -> None:
    assert unit_roundoff(kind) == 2.0**-digits
    half_way = torch.tensor(1.0 + 2.0**-digits, dtype=torch.float64)
    if kind != torch.float64:
        assert float(half_way - half_way.to(kind)) == 2.0**-digits


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_gamma_bounds_products_of_rounding_errors(kind: torch.dtype) -> None:
    u = unit_roundoff(kind)
    for count in (1, 2, 9, 200):
        assert (1 + u) ** count - 1 <= gamma(count, kind)
        assert gamma(count, kind) < (1 + u) ** count * count * u / (1 - count * u)
    with pytest.raises(ValueError, match="no bound"):
        gamma(round(1 / u), kind)


def test_a_bound_on_sums_is_reached_by_the_worst_terms() -> None:
    # Each of the small terms is half a unit in the last place of the sum, and so is lost by rounding.
    terms = torch.full((1000,), unit_roundoff(torch.float32))
    terms[0] = 1.0
    error = float(terms.double().sum() - one_by_one(terms).double())
    bound = sum_bound(float(terms.double().sum()), 999, torch.float32)
    assert 0.99 * bound < error <= bound


@pytest.mark.parametrize("count", [1, 7, 100, 1000])
def test_sums_in_any_order_keep_to_both_bounds(count: int) -> None:
    terms = random(500, count)
    exact = terms.double().sum(-1)
    always = sum_bound(terms.double().abs().sum(-1), count, torch.float32)
    mostly = random_sum_bound(terms.double().square().sum(-1), count, torch.float32)
    for found in (terms.sum(-1), one_by_one(terms), one_by_one(terms.flip(-1)), terms @ torch.ones(count)):
        assert_within(found, exact, always)
        assert_within(found, exact, mostly)


def test_both_bounds_show_a_term_that_is_missing_and_sums_of_less_precision() -> None:
    terms = random(500, 1000)
    exact, squares = terms.double().sum(-1), terms.double().square().sum(-1)
    always = sum_bound(terms.double().abs().sum(-1), 1000, torch.float32)
    mostly = random_sum_bound(squares, 1000, torch.float32)
    for bound in (always, mostly):
        with pytest.raises(AssertionError, match="than rounding explains"):
            assert_within(terms[:, 1:].sum(-1), exact, bound)
        with pytest.raises(AssertionError, match="than rounding explains"):
            assert_within(one_by_one(terms.bfloat16()), exact, bound)
    assert float(mostly.max()) < float(always.min()) / 3


def test_one_deviation_bounds_the_root_mean_square_of_random_sums_and_is_not_far_from_it() -> None:
    terms = random(2000, 400)
    errors = one_by_one(terms).double() - terms.double().sum(-1)
    bound = random_sum_bound(terms.double().square().sum(-1), 400, torch.float32, deviations=1.0)
    assert 0.2 * bound.norm() < errors.norm() <= bound.norm()


def test_a_result_that_is_stored_in_fewer_bits_may_err_by_one_more_rounding() -> None:
    exact = random(10_000).double()
    bound = rounded_bound(exact, torch.zeros_like(exact), torch.bfloat16)
    assert_within(exact.bfloat16(), exact, bound)
    with pytest.raises(AssertionError, match="than rounding explains"):
        assert_within((exact.bfloat16() * torch.tensor(1 / 3).bfloat16()) * 3, exact, bound)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_bounds_of_transformed_convolutions_show_one_rough_number_and_one_missing_channel(side: int) -> None:
    x, weight, grad = (
        random(8, 64, side, side).sign(),
        random(32, 64, 3, 3, seed=1),
        random(8, 32, side, side),
    )
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    bound, by_x, by_weight = tiny_conv_bounds(x, weight, grad, torch.float32)
    assert (by_x.shape, by_weight.shape) == (x.shape, weight.shape)
    assert_within(tiny_conv3x3(x, weight), exact, bound)
    rough = weight.clone()
    rough[3] = rough[3].bfloat16().float()  # as autocast would take it
    fewer = x.clone()
    fewer[:, 5] = 0.0
    for wrong in (tiny_conv3x3(x, rough), tiny_conv3x3(fewer, weight)):
        with pytest.raises(AssertionError, match="than rounding explains"):
            assert_within(wrong, exact, bound)


def test_a_failure_says_how_many_and_which_is_the_worst() -> None:
    found, exact = torch.tensor([[1.0, 2.0], [3.5, 4.25]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert_within(found, exact, 0.5)
    with pytest.raises(
        AssertionError, match=r"gain: 2 of 4 .* such as 3\.5 at \(1, 0\), where 3\.0 is exact"
    ):
        assert_within(found, exact, 0.125, "gain")
    with pytest.raises(AssertionError, match=r"such as nan at \(1,\)"):
        assert_within(torch.tensor([1.0, math.nan]), torch.ones(2), 1.0)
    with pytest.raises(AssertionError):
        assert_within(torch.ones(2), torch.ones(1, 2), 1.0)
