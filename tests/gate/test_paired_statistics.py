"""Exact statistics of paired models: arguments, and the bounds of single outcomes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, norm

from qat.gate.paired_statistics import (
    Pairs,
    accuracy_interval,
    detectable_drop,
    images_needed,
    lower_bound,
    mcnemar_p,
    power_to_fail,
    power_to_pass,
    upper_bound,
)
from tests.helpers.cases import exhaustive

#: Examples of what computes several bounds, each of which takes a fifth of a second.
EXAMPLES = pytest.mark.parametrize("examples", [6, exhaustive(40)])


@st.composite
def some_pairs(draw: st.DrawFn, most: int = 300) -> Pairs:
    n = draw(st.integers(1, most))
    lost = draw(st.integers(0, n))
    return Pairs(n, lost, draw(st.integers(0, n - lost)))


CONFIDENCE = st.sampled_from([0.6, 0.8, 0.95, 0.99, 0.9999])


@pytest.mark.parametrize(("n", "lost", "gained"), [(0, 0, 0), (-1, 0, 0), (5, -1, 0), (5, 0, -1), (5, 3, 3)])
def test_counts_that_no_comparison_can_have_are_refused(n: int, lost: int, gained: int) -> None:
    with pytest.raises(ValueError, match=r"lost|at least one image"):
        Pairs(n, lost, gained)


def test_change_and_discordant_pairs_follow_from_the_counts() -> None:
    pairs = Pairs(200, 6, 2)
    assert pairs.change == -0.02
    assert pairs.discordant == 8


@given(some_pairs())
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(pairs: Pairs) -> None:
    wanted = binomtest(pairs.lost, pairs.discordant, 0.5).pvalue if pairs.discordant else 1.0
    assert mcnemar_p(pairs) == pytest.approx(wanted, rel=1e-9)


@given(st.integers(1, 50_000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.999]))
def test_the_accuracy_interval_is_that_of_clopper_and_pearson(
    n: int, share: float, confidence: float
) -> None:
    correct = round(share * n)
    wanted = binomtest(correct, n).proportion_ci(confidence, "exact")
    assert accuracy_interval(correct, n, confidence) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


@pytest.mark.parametrize("confidence", [0.5, 1.0, -1.0, 95.0, math.nan])
def test_a_confidence_that_is_no_share_above_a_half_is_refused(confidence: float) -> None:
    for call in (
        lambda: upper_bound(Pairs(9, 1, 0), confidence),
        lambda: lower_bound(Pairs(9, 1, 0), confidence),
        lambda: power_to_pass(9, 0.1, 0.1, 0.1, confidence),
        lambda: power_to_fail(9, 0.1, 0.1, 0.1, confidence),
        lambda: images_needed(0.1, 0.1, confidence),
        lambda: detectable_drop(9, 0.1, 0.1, confidence),
        lambda: accuracy_interval(1, 9, confidence),
    ):
        with pytest.raises(ValueError, match="confidence"):
            call()


def test_other_arguments_out_of_range_are_refused_by_name() -> None:
    for name, call in (
        ("n is 0", lambda: power_to_pass(0, 0.1, 0.1, 0.1, 0.95)),
        ("p_lost", lambda: power_to_pass(9, -0.1, 0.1, 0.1, 0.95)),
        ("p_gained", lambda: power_to_fail(9, 0.5, 0.6, 0.1, 0.95)),
        ("p_lost", lambda: power_to_fail(9, math.nan, 0.6, 0.1, 0.95)),
        ("max_drop", lambda: power_to_fail(9, 0.1, 0.1, -0.1, 0.95)),
        ("max_drop", lambda: images_needed(0.1, 1.1, 0.95)),
        ("power", lambda: images_needed(0.1, 0.1, 0.95, 1.0)),
        ("power", lambda: detectable_drop(9, 0.1, 0.1, 0.95, 0.2)),
        ("correct", lambda: accuracy_interval(10, 9)),
        ("correct", lambda: accuracy_interval(-1, 9)),
    ):
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.parametrize(("p_lost", "p_gained"), [(0.9, 0.1), (0.7, 0.3), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_shares_at_the_edge_are_accepted(p_lost: float, p_gained: float) -> None:
    for power in (power_to_pass, power_to_fail):
        assert 0 <= power(30, p_lost, p_gained, 0.02, 0.95) <= 1


@pytest.mark.parametrize(("n", "within"), [(30, 1e-7), (99, 1e-7), (100, 1e-7), (360, 1e-7), (5000, 2e-6)])
def test_without_discordant_pairs_the_bound_is_the_rule_of_three(n: int, within: float) -> None:
    assert lower_bound(Pairs(n, 0, 0), 0.95) == pytest.approx(0.05 ** (1 / n) - 1, abs=within)


@EXAMPLES
def test_the_bounds_are_mirror_images_and_hold_the_observed_change(examples: int) -> None:
    @given(some_pairs(), CONFIDENCE)
    @settings(max_examples=examples)
    def hold(pairs: Pairs, confidence: float) -> None:
        low, high = lower_bound(pairs, confidence), upper_bound(pairs, confidence)
        assert -1 <= low <= pairs.change <= high <= 1
        assert low == -upper_bound(Pairs(pairs.n, pairs.gained, pairs.lost), confidence)

    hold()


@EXAMPLES
def test_another_lost_image_lowers_the_bound_and_another_gained_one_raises_it(examples: int) -> None:
    @given(some_pairs(80), CONFIDENCE)
    @settings(max_examples=examples)
    def hold(pairs: Pairs, confidence: float) -> None:
        here = upper_bound(pairs, confidence)
        if pairs.discordant < pairs.n:
            assert upper_bound(Pairs(pairs.n, pairs.lost + 1, pairs.gained), confidence) <= here + 1e-7
            assert upper_bound(Pairs(pairs.n, pairs.lost, pairs.gained + 1), confidence) >= here - 1e-7

    hold()


@EXAMPLES
def test_more_confidence_gives_a_wider_bound(examples: int) -> None:
    @given(some_pairs(80))
    @settings(max_examples=examples)
    def hold(pairs: Pairs) -> None:
        bounds = [upper_bound(pairs, confidence) for confidence in (0.6, 0.8, 0.95, 0.99)]
        assert bounds == sorted(bounds)

    hold()


@pytest.mark.parametrize("n", [1, 2, 17])
def test_extreme_outcomes_have_bounds(n: int) -> None:
    assert upper_bound(Pairs(n, 0, n), 0.95) == 1
    assert lower_bound(Pairs(n, n, 0), 0.95) == -1
    # Only this outcome is as extreme, and likeliest where no answer is in common: p_lost = (1 - change) / 2.
    assert upper_bound(Pairs(n, n, 0), 0.95) == pytest.approx(1 - 2 * 0.05 ** (1 / n), abs=1e-6)


def tango_upper(pairs: Pairs, confidence: float) -> float:
    """Upper end of Tango's interval, from the likelihood itself: a numeric maximum, no closed form."""

    def score(change: float) -> float:
        def surprise(p_gained: float) -> float:
            p_lost = p_gained - change
            rest = 1 - p_lost - p_gained
            logs = (pairs.lost, p_lost), (pairs.gained, p_gained), (pairs.n - pairs.discordant, rest)
            return -sum(count * math.log(share) for count, share in logs)

        edges = (max(change, 0) + 1e-12, (1 + change) / 2 - 1e-12)
        p_gained = minimize_scalar(surprise, bounds=edges, method="bounded", options={"xatol": 1e-12}).x
        variance = (2 * p_gained - change - change**2) / pairs.n
        return float((pairs.change - change) / math.sqrt(variance) + norm.ppf(confidence))

    return float(brentq(score, pairs.change + 1e-9, 0.9))


@pytest.mark.parametrize(
    ("n", "lost", "gained"),
    [
        (5000, 200, 180),
        (20_000, 900, 700),
        exhaustive(50_000, 1000, 1000),
        exhaustive(50_000, 300, 600),
    ],
)
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_for_many_images_the_bound_nears_tangos_interval(
    n: int, lost: int, gained: int, confidence: float
) -> None:
    pairs = Pairs(n, lost, gained)
    wanted = tango_upper(pairs, confidence)
    width = wanted - pairs.change
    assert wanted - 1e-3 * width < upper_bound(pairs, confidence) < wanted + 0.04 * width
