"""How far floating-point results may lie from exact ones, whatever the order in which a machine adds.

Processors and libraries add the terms of a sum in different orders, with or without fused multiply-adds, in
vectors of different lengths. A test that compares with exact arithmetic (float64 stands for it) takes its
tolerance from here instead of from what one machine happened to show.

Notation: ``u`` is the unit roundoff, half the distance from 1 to the next number. One operation multiplies
its exact result by 1 + δ with |δ| ≤ u (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition,
2002, equation 2.4). Underflow is left out, as there.
"""

from __future__ import annotations

import math
from typing import Final, TypeVar

import torch
from torch import Tensor

from qat.ops.winograd import Transforms, transforms

Number = TypeVar("Number", float, Tensor)

#: λ of `random_sum_bound`. By Hoeffding's inequality an error exceeds that bound with a probability of less
#: than 2 exp(-8² / 2) = 3e-14: once in 3e7 comparisons of a million values.
DEVIATIONS: Final = 8.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """``u``: 2^-24 of float32, 2^-8 of bfloat16."""
    return torch.finfo(dtype).eps / 2


def gamma(count: int, dtype: torch.dtype) -> float:
    """``γ_n = n u / (1 - n u)``: bound on the relative error of n operations one after the other.

    Higham 2002, lemma 3.1. Raises `ValueError` where n u reaches 1, beyond which there is no bound.
    """
    share = count * unit_roundoff(dtype)
    if not share < 1:
        raise ValueError(f"{count} operations in {dtype}: no bound")
    return share / (1 - share)


def sum_bound(magnitudes: Number, count: int, dtype: torch.dtype) -> Number:
    """Bound on the error of sums, in any order: ``γ_n Σ|t|`` (Higham 2002, §3.1 and §4.2).

    Args:
        magnitudes: ``Σ|t|`` of each sum, of the exact terms.
        count: n, roundings that a term passes through: one for each that is added, one for each product or
            other operation that made it.
        dtype: in which the machine computes.
    """
    return magnitudes * gamma(count, dtype)


def random_sum_bound(
    squares: Tensor, count: int, dtype: torch.dtype, deviations: float = DEVIATIONS
) -> Tensor:
    """Bound on the error of sums whose terms are independent and of random sign: ``λ u √(n Σt²)``.

    For hundreds of terms, where `sum_bound` is so wide that it would hide a missing term. An addition
    errs by at most u times its partial sum. These errors are independent and as often above as below, so
    that their sum stays below λ times the root of the sum of their squares, but for a probability of 2
    exp(-λ²/2) (Higham & Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci.
    Comput. 41, 2019). With random signs the square of a partial sum of k terms is k t² in the mean, not
    k² t² (the same, Sharper Probabilistic Backward Error Analysis for Basic Linear Algebra Kernels with
    Random Data, SIAM J. Sci. Comput. 42, 2020). Added one by one, the squares of all n partial sums are
    half of n Σt² in the mean, in any other order less; the other half is left for sums above the mean.

    Args:
        squares: ``Σt²`` of each sum.
        count: n as in `sum_bound`.
        dtype: in which the machine computes.
        deviations: λ; with 1 it bounds the root mean square of many errors.
    """
    return squares.sqrt() * (deviations * unit_roundoff(dtype) * math.sqrt(count))


def rounded_bound(exact: Number, bound: Number, dtype: torch.dtype) -> Number:
    """Bound on a result of error ``bound`` that is then rounded once to ``dtype``, as for storing it."""
    return bound + (abs(exact) + bound) * unit_roundoff(dtype)


def tiny_conv_bounds(
    x: Tensor, weight: Tensor, grad: Tensor, dtype: torch.dtype, deviations: float = DEVIATIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """`random_sum_bound` of `qat.ops.winograd.tiny_conv3x3` and of its gradients by ``x`` and ``weight``.

    A value is ``R · Σ ((G w) ⊙ (D x))``, a gradient the same with the matrices exchanged. The squares of its
    terms are that formula of squared matrices and numbers; a term passes through the sums of both transforms,
    of the channels (of the images for a weight's gradient) and of the result, through one product, and the
    entries of the three matrices are rounded themselves.

    Args:
        x: (N, C, H, W), of random sign as the others are.
        weight: (O, C, 3, 3).
        grad: (N, O, H, W), of the result.
        dtype: in which it is computed.
        deviations: λ.
    """
    exact = transforms(*x.shape[2:], torch.float64)
    squared = Transforms(*(matrix.square() for matrix in exact))
    images, kernels, results = (one.detach().double().square().flatten(2) for one in (x, weight, grad))
    by_pixel = torch.einsum("pj,ncj->pnc", squared.data, images)
    by_tap = torch.einsum("pj,ocj->poc", squared.weights, kernels)
    by_result = torch.einsum("ip,noi->pno", squared.result, results)
    # Terms of each matrix's longest sum, as it is applied, and transposed for gradients.
    into = [int((matrix != 0).sum(1).max()) for matrix in exact]
    back = [int((matrix != 0).sum(0).max()) for matrix in exact]
    data, taps, result = 0, 1, 2  # in the order of `Transforms`
    own = 4  # the product, and the entries of three matrices

    def bound(squares: Tensor, count: int, like: Tensor) -> Tensor:
        return random_sum_bound(squares, count + own, dtype, deviations).view(like.shape)

    return (
        bound(
            torch.einsum("ip,poc,pnc->noi", squared.result, by_tap, by_pixel),
            into[data] + into[taps] + x.shape[1] + into[result],
            grad,
        ),
        bound(
            torch.einsum("pj,poc,pno->ncj", squared.data, by_tap, by_result),
            into[taps] + back[result] + weight.shape[0] + back[data],
            x,
        ),
        bound(
            torch.einsum("pj,pnc,pno->ocj", squared.weights, by_pixel, by_result),
            into[data] + back[result] + len(x) + back[taps],
            weight,
        ),
    )


def assert_within(found: Tensor, exact: Tensor, bound: Tensor | float, what: str = "") -> None:
    """Fail where ``found`` is further than ``bound`` from ``exact``, or is no number where that is one.

    Args:
        found: any floating-point type.
        exact: of the same shape.
        bound: absolute, of that shape or one that spreads to it.
        what: said if it fails.
    """
    assert found.shape == exact.shape, what
    found, exact = found.detach().double(), exact.detach().double()
    distance = (found - exact).abs()
    allowed = torch.as_tensor(bound, dtype=torch.float64).detach().expand(distance.shape)
    wrong = ~(distance <= allowed)
    if wrong.any():
        excess = torch.where(wrong, (distance / allowed).nan_to_num(math.inf), 0.0)
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{what}{': ' if what else ''}{int(wrong.sum())} of {wrong.numel()} values are further from the "
            f"exact ones than rounding explains, such as {float(found[at])!r} at {at}, where "
            f"{float(exact[at])!r} is exact and a difference of {float(allowed[at]):.3g} allowed"
        )


def assert_integers(steps: Tensor) -> None:
    """Fail where ``q s / s`` of float32 is no integer q up to the rounding of a product and a quotient."""
    integers = steps.detach().double().round()
    assert_within(steps, integers, integers.abs() * gamma(2, torch.float32))
