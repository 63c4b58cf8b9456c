"""Passes over images of any size equal the formulas they stand for."""

import pytest
import torch
from torch import Tensor

from qat.ops import planes as passes
from qat.ops.planes import channel_sums, dot, multiply_add, portions, spread, without_autocast
from tests.helpers.rounding_bounds import assert_within, sum_bound

#: One pixel, too few for a register, just enough, many.
SIDES = [(1, 1), (2, 2), (3, 5), (4, 4), (9, 7)]
KINDS = [torch.float32, torch.float64, torch.bfloat16]


def images(*shape: int, kind: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(kind)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(3,), (1, 3), (4, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_spread_over_the_pixels_they_belong_to(
    side: tuple[int, int], shape: tuple[int, ...], kind: torch.dtype
) -> None:
    values, x = images(*shape), images(4, 3, *side, kind=kind)
    found = spread(values, x)
    assert found.dtype == kind
    assert torch.equal(found.expand_as(x), values.to(kind).view(-1, 3, 1, 1).expand_as(x))
    assert x.numel() == 12 or found.is_contiguous()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_added(side: tuple[int, int], kind: torch.dtype) -> None:
    base, x = images(4, 3, *side, kind=kind), images(4, 3, *side, kind=kind).flip(0)
    factor = images(3)
    found = multiply_add(base, x, spread(factor, x))
    product = x.double() * factor.to(kind).double().view(1, 3, 1, 1)
    assert found.dtype == kind
    # A product and a sum; those of float64 that it is compared with are rounded, too.
    bound = sum_bound(base.double().abs() + product.abs(), 4 if kind == torch.float64 else 2, kind)
    assert_within(found, base.double() + product, bound)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_sums_of_channels_are_taken_in_the_type_that_is_asked_for(
    side: tuple[int, int], kind: torch.dtype
) -> None:
    x = images(4, 3, *side, kind=kind)
    found = channel_sums(x, torch.float64)
    assert found.dtype == torch.float64
    # Of each image in its own type.
    bound = 2 * sum_bound(x.double().abs().sum((0, 2, 3)), x[0, 0].numel() + len(x), kind)
    assert_within(found, x.double().sum((0, 2, 3)), bound)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("portion", [1, 300, 2**21])
def test_portions_are_the_batch_cut_into_parts(
    count: int, portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "PORTION", portion)
    x, other = images(count, 3, 4, 4), images(count, 3, 4, 4).flip(1)
    parts = [x[some] for some in portions(x)]
    assert torch.equal(torch.cat(parts), x)
    assert all(len(part) == 1 or part.nbytes <= portion for part in parts)
    torch.testing.assert_close(dot(x, other), (x * other).sum((2, 3)))


def test_autocast_is_off_inside_and_on_again_behind() -> None:
    a = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with without_autocast(a):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
    with without_autocast(torch.empty(1, device="meta")):  # a device without autocast
        pass
