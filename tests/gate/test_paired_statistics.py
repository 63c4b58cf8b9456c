"""Exact statistics of paired models: rates that hold wherever the truth lies, and power that is observed."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, multinomial, norm

import qat.gate.paired_statistics
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

Shares = NDArray[np.float64]
Counts = NDArray[np.int64]
upper = functools.cache(upper_bound)
further = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
#: Examples of what computes several bounds, each of which takes a fifth of a second.
EXAMPLES = pytest.mark.parametrize("examples", [6, further(40)])


def lower(pairs: Pairs, confidence: float) -> float:
    return -upper(Pairs(pairs.n, pairs.gained, pairs.lost), confidence)


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


# The bounds of single outcomes.


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
        further(50_000, 1000, 1000),
        further(50_000, 300, 600),
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


# The guarantee: every outcome of small n, under many true shares.


def outcomes(n: int) -> tuple[Counts, Counts]:
    lost, gained = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    possible = lost + gained <= n
    return lost[possible], gained[possible]


def probabilities(n: int, p_lost: Shares, p_gained: Shares) -> Shares:
    """Probability of each outcome (outcomes,) under each pair of shares: (points, outcomes)."""
    lost, gained = outcomes(n)
    counts = np.stack([lost, gained, n - lost - gained], axis=-1)
    rest = np.clip(1 - p_lost - p_gained, 0, 1)
    return np.asarray(multinomial.pmf(counts, n, np.stack([p_lost, p_gained, rest], axis=-1)[:, None]))


def line(change: float, points: int = 97) -> tuple[Shares, Shares]:
    """Shares with that true change; at both ends dense, and off the points that the search visits."""
    smaller = (1 - abs(change)) / 2 * np.sin(np.linspace(0, math.pi / 2, points)) ** 2.3
    return smaller + max(-change, 0), smaller + max(change, 0)


@pytest.mark.parametrize(
    ("n", "confidence"),
    [*((n, level) for n in (1, 2) for level in (0.6, 0.95)), further(6, 0.6), (6, 0.95)]
    + [further(12, level) for level in (0.6, 0.95)],
)
def test_the_region_of_power_is_where_the_bounds_say_pass_or_fail(n: int, confidence: float) -> None:
    lost, gained = outcomes(n)
    all_pairs = [Pairs(n, int(a), int(b)) for a, b in zip(lost, gained, strict=True)]
    for max_drop in (0.0, 0.013, 0.1, 0.4, 1.0):
        failed = [upper(pairs, confidence) < -max_drop for pairs in all_pairs]
        passed = [lower(pairs, confidence) >= -max_drop for pairs in all_pairs]
        for p_lost, p_gained in ((0.3, 0.1), (0.02, 0.05), (0.6, 0.0), (0.5, 0.5)):
            chance = probabilities(n, np.array([p_lost]), np.array([p_gained]))[0]
            fail, pass_ = chance[failed].sum(), chance[passed].sum()
            assert power_to_fail(n, p_lost, p_gained, max_drop, confidence) == pytest.approx(fail, abs=1e-7)
            assert power_to_pass(n, p_lost, p_gained, max_drop, confidence) == pytest.approx(pass_, abs=1e-7)


@pytest.mark.parametrize("n", [20, further(60), pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("max_drop", [0.0, 0.01, 0.037, 0.2])
def test_wrong_verdicts_are_never_likelier_than_the_error_rate(n: int, max_drop: float) -> None:
    """Failing although the drop is within bounds, passing although it isn't: on the boundary and beyond."""
    lost, gained = outcomes(n)
    confidences = np.array([0.8, 0.95, 0.99])
    failed = np.stack([fails(n, lost, gained, max_drop, one) for one in confidences], axis=-1)
    passed = np.stack([passes(n, lost, gained, max_drop, one) for one in confidences], axis=-1)
    for beyond in (0.0, 1e-4, 0.004, 0.03, 0.3):
        within = probabilities(n, *line(-max_drop + beyond))
        assert ((within @ failed).max(axis=0) <= 1 - confidences + 1e-6).all()
        outside = probabilities(n, *line(-max_drop - beyond))
        assert ((outside @ passed).max(axis=0) <= 1 - confidences + 1e-6).all()


@pytest.mark.parametrize(("n", "confidence"), [(20, 0.8), (20, 0.99), further(45, 0.95)])
def test_no_bound_of_this_order_is_tighter(n: int, confidence: float) -> None:
    """Outcomes at least as extreme have the error rate at the bound: more just beyond it, less before it."""
    for pairs in (Pairs(n, 5, 1), Pairs(n, 0, 0), Pairs(n, 3, 9), Pairs(n, 12, 8)):
        extreme = at_least_as_extreme(pairs, confidence)
        bound = upper_bound(pairs, confidence)
        above, below = (
            (probabilities(n, *line(bound + shift, 301)) @ extreme).max() for shift in (1e-4, -1e-4)
        )
        assert above < 1 - confidence < below


def at_least_as_extreme(pairs: Pairs, confidence: float) -> NDArray[np.bool_]:
    """Outcomes whose approximate bound is as low as that of ``pairs``: each one's bound is computed."""
    limits = all_limits(pairs.n, confidence)
    return np.array([limit >= limits[pairs.lost, pairs.gained] - 1e-10 for limit in limits.values()])


@functools.cache
def all_limits(n: int, confidence: float) -> dict[tuple[int, int], float]:
    """The approximate bound of the drop of each outcome, by (lost, gained)."""
    quantile = norm.ppf(confidence)

    def limit(lost: float, gained: float) -> float:
        if gained == n:
            return -1.0
        score = functools.partial(qat.gate.paired_statistics._score, n, lost, gained)
        return float(brentq(lambda drop: score(drop) - quantile, -1 + 1e-12, 1 - 1e-12, xtol=1e-13))

    return {(int(a), int(b)): limit(float(a), float(b)) for a, b in zip(*outcomes(n), strict=True)}


@pytest.mark.parametrize("n", [1, 3, 20, 45])
def test_the_score_is_monotone_in_both_counts_and_the_drop(n: int) -> None:
    """What makes regions thresholds, nested, and their probability largest on the boundary."""
    lost, gained = np.meshgrid(np.arange(n + 1.0), np.arange(n + 1.0), indexing="ij")
    possible = lost + gained <= n
    before = np.full(lost.shape, np.inf)
    for drop in np.linspace(-0.9999, 0.9999, 801):
        score = np.where(
            possible, qat.gate.paired_statistics._score(n, lost, np.minimum(gained, n - lost), drop), np.nan
        )
        with np.errstate(invalid="ignore"):
            assert not (np.diff(score, axis=0)[score[:-1] > 0.1] < 0).any()
            assert not (np.diff(score, axis=1)[score[:, 1:] > 0.1] > 0).any()
            assert not ((score > before) & (score > 0.1)).any()
        before = score


@pytest.mark.parametrize("n", [7, 33, 360])
@given(st.floats(-0.9, 0.9), st.floats(-0.9, 0.9), st.floats(0, 1))
@settings(max_examples=12)
def test_the_probability_of_a_region_is_the_sum_over_its_outcomes(
    n: int, limit: float, drop: float, where: float
) -> None:
    lost, gained = outcomes(n)
    region = qat.gate.paired_statistics._Region(n, limit, 0.95)
    score = qat.gate.paired_statistics._score(n, lost.astype(float), gained.astype(float), limit)
    smaller = (1 - abs(drop)) / 2 * where
    p_lost, p_gained = smaller + max(drop, 0), smaller + max(-drop, 0)
    chance = probabilities(n, np.array([p_lost]), np.array([p_gained]))[0]
    assert region.chance(p_lost, p_gained) == pytest.approx(chance[score >= norm.ppf(0.95)].sum(), abs=1e-7)


@pytest.mark.parametrize(
    ("n", "drop"),
    [
        *((361, drop) for drop in (-0.02, 0.0, 0.005)),
        *(further(2000, drop) for drop in (-0.02, 0.0, 0.005)),
        pytest.param(20_000, 0.0, marks=pytest.mark.slow),
        *(further(20_000, drop) for drop in (-0.02, 0.005)),
    ],
)
def test_on_a_far_finer_grid_too_the_region_keeps_the_error_rate_and_a_larger_one_does_not(
    n: int, drop: float
) -> None:
    region = qat.gate.paired_statistics._critical_region(n, drop, 0.95)
    one_more = qat.gate.paired_statistics._Region(n, region.limit - 1e-9, 0.95)
    p_lost, p_gained = line(-drop, 900 if n < 20_000 else 200)
    assert region.probability(p_lost, p_gained).max() <= 0.05
    assert one_more.probability(p_lost, p_gained).max() > 0.05 * (1 - 1e-3)


# Planning: how many images, and which drop shows.


@pytest.mark.parametrize(
    ("discordance", "max_drop", "confidence", "power"),
    [
        (0.02, 0.03, 0.95, 0.8),
        further(0.05, 0.03, 0.95, 0.8),
        (0.05, 0.02, 0.9, 0.9),
        (0.2, 0.03, 0.95, 0.8),
        (0.02, 0.01, 0.95, 0.5),
        further(0.005, 0.0025, 0.95, 0.8),
        further(0.2, 0.01, 0.99, 0.8),
    ],
)
def test_the_images_needed_suffice_and_a_tenth_fewer_do_not(
    discordance: float, max_drop: float, confidence: float, power: float
) -> None:
    n = images_needed(discordance, max_drop, confidence, power)
    assert n is not None
    half = discordance / 2
    assert power_to_pass(n, half, half, max_drop, confidence) >= power
    assert power_to_pass(round(0.9 * n), half, half, max_drop, confidence) < power


def test_without_discordance_the_images_needed_are_those_of_the_rule_of_three() -> None:
    assert images_needed(0.0, 0.03, 0.95) in (99, 100, 101)  # 0.97**99 is the first power below 5 %


def test_no_number_of_images_shows_that_nothing_at_all_was_lost() -> None:
    assert images_needed(0.1, 0.0, 0.95) is None
    assert images_needed(0.5, 1e-4, 0.95) is None
    assert images_needed(0.1, 1.0, 0.95) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("discordance", "max_drop"),
    [further(0.2, 0.005), further(0.2, 0.0025), (0.05, 0.001), further(0.02, 0.0005)],
)
def test_images_needed_agree_with_the_normal_formula_where_they_are_many(
    discordance: float, max_drop: float
) -> None:
    wanted = (norm.ppf(0.95) + norm.ppf(0.8)) ** 2 * discordance / max_drop**2
    assert images_needed(discordance, max_drop, 0.95) == pytest.approx(wanted, rel=0.025)


@pytest.mark.slow
@pytest.mark.parametrize(("discordance", "max_drop"), [(0.005, 0.00075), further(0.02, 0.0015)])
def test_where_the_supremum_is_left_out_images_needed_are_within_2_percent(
    discordance: float, max_drop: float
) -> None:
    n = images_needed(discordance, max_drop, 0.95)
    assert n is not None
    assert n > qat.gate.paired_statistics._MANY_IMAGES
    half = discordance / 2
    assert power_to_pass(math.ceil(1.02 * n), half, half, max_drop, 0.95) >= 0.8
    assert power_to_pass(math.floor(0.98 * n), half, half, max_drop, 0.95) < 0.8


@pytest.mark.parametrize(
    ("n", "discordance", "max_drop", "power"),
    [(100, 0.1, 0.0, 0.8), (360, 0.02, 0.01, 0.8), (2000, 0.05, 0.005, 0.9), (2000, 0.0, 0.01, 0.5)],
)
def test_the_detectable_drop_fails_with_that_power_and_a_smaller_one_does_not(
    n: int, discordance: float, max_drop: float, power: float
) -> None:
    drop = detectable_drop(n, discordance, max_drop, 0.95, power)
    assert drop is not None
    assert drop > max_drop
    gained = discordance / 2
    assert power_to_fail(n, gained + drop, gained, max_drop, 0.95) >= power
    assert power_to_fail(n, gained + drop - 1e-5, gained, max_drop, 0.95) < power


@pytest.mark.parametrize(("n", "discordance", "max_drop"), [(3, 0.5, 0.4), (50, 0.9, 0.2), (50, 0.0, 1.0)])
def test_there_is_no_detectable_drop_where_even_the_largest_does_not_show(
    n: int, discordance: float, max_drop: float
) -> None:
    assert detectable_drop(n, discordance, max_drop, 0.95) is None


# Simulated models.


def fails(n: int, lost: Counts, gained: Counts, max_drop: float, confidence: float) -> NDArray[np.bool_]:
    region = qat.gate.paired_statistics._critical_region(n, max_drop, confidence)
    return gained <= region.thresholds(lost.astype(np.float64))


def passes(n: int, lost: Counts, gained: Counts, max_drop: float, confidence: float) -> NDArray[np.bool_]:
    region = qat.gate.paired_statistics._critical_region(n, -max_drop, confidence)
    return lost <= region.thresholds(gained.astype(np.float64))


@pytest.mark.parametrize(("n", "all_lost"), [(360, [0, 3, 9, 25]), further(2000, [25, 60, 120])])
def test_on_both_sides_of_the_threshold_the_bounds_give_the_verdict_of_the_region(
    n: int, all_lost: list[int]
) -> None:
    edges = 0
    for lost in all_lost:
        counts = np.arange(n - lost + 1)
        for verdict in (fails, passes):
            hit = verdict(n, np.full(counts.shape, lost), counts, 0.01, 0.95)
            edge = np.flatnonzero(np.diff(hit))
            edges += edge.size
            for gained in (edge[0], edge[0] + 1) if edge.size else (0,):
                pairs = Pairs(n, lost, int(gained))
                bound = upper_bound(pairs, 0.95) if verdict is fails else lower_bound(pairs, 0.95)
                assert (bound < -0.01 if verdict is fails else bound >= -0.01) == hit[gained]
    assert edges > len(all_lost)


@pytest.mark.parametrize(("n", "discordance"), [(360, 0.04), (360, 0.15), (2000, 0.02), (2000, 0.1)])
@pytest.mark.parametrize("max_drop", [0.0, 0.01])
def test_simulated_models_get_wrong_verdicts_as_rarely_and_right_ones_as_often_as_stated(
    n: int, discordance: float, max_drop: float
) -> None:
    random = np.random.default_rng(n + round(1000 * discordance))
    simulations, confidence = 20_000, 0.95
    for drop in (max_drop, max_drop + 0.01, 0.0):
        p_lost, p_gained = (discordance + drop) / 2, (discordance - drop) / 2
        counts = random.multinomial(n, [p_lost, p_gained, 1 - discordance], simulations)
        for verdict, power in ((fails, power_to_fail), (passes, power_to_pass)):
            observed = verdict(n, counts[:, 0], counts[:, 1], max_drop, confidence).mean()
            stated = power(n, p_lost, p_gained, max_drop, confidence)
            error = math.sqrt(stated * (1 - stated) / simulations)
            # Forty comparisons: chance exceeds 3 standard errors in one of ten seeds, 4 in one of 400.
            assert observed == pytest.approx(stated, abs=4 * error + 1e-4)
            if drop == max_drop:
                assert observed <= 1 - confidence + 3 * math.sqrt(0.05 * 0.95 / simulations)
