"""Error rates that hold for all true shares: by all outcomes of few images, and by simulated models."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import multinomial, norm

import qat.gate.paired_statistics
from qat.gate.paired_statistics import Pairs, lower_bound, power_to_fail, power_to_pass, upper_bound
from tests.helpers.cases import exhaustive

Shares = NDArray[np.float64]
Counts = NDArray[np.int64]
upper = functools.cache(upper_bound)


def lower(pairs: Pairs, confidence: float) -> float:
    return -upper(Pairs(pairs.n, pairs.gained, pairs.lost), confidence)


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
    """Shares with that true change, dense at both ends, and not at the points that the search visits."""
    smaller = (1 - abs(change)) / 2 * np.sin(np.linspace(0, math.pi / 2, points)) ** 2.3
    return smaller + max(-change, 0), smaller + max(change, 0)


@pytest.mark.parametrize(
    ("n", "confidence"),
    [*((n, level) for n in (1, 2) for level in (0.6, 0.95)), exhaustive(6, 0.6), (6, 0.95)]
    + [exhaustive(12, level) for level in (0.6, 0.95)],
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


@pytest.mark.parametrize("n", [20, exhaustive(60), pytest.param(100, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize(("n", "confidence"), [(20, 0.8), (20, 0.99), exhaustive(45, 0.95)])
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
        score = functools.partial(qat.gate.paired_statistics.tango_score, n, lost, gained)
        return float(brentq(lambda drop: score(drop) - quantile, -1 + 1e-12, 1 - 1e-12, xtol=1e-13))

    return {(int(a), int(b)): limit(float(a), float(b)) for a, b in zip(*outcomes(n), strict=True)}


@pytest.mark.parametrize("n", [1, 3, 20, 45])
def test_the_score_is_monotone_in_both_counts_and_the_drop(n: int) -> None:
    """So regions are given by thresholds and are nested, and their probability is largest at the boundary."""
    lost, gained = np.meshgrid(np.arange(n + 1.0), np.arange(n + 1.0), indexing="ij")
    possible = lost + gained <= n
    before = np.full(lost.shape, np.inf)
    for drop in np.linspace(-0.9999, 0.9999, 801):
        score = np.where(
            possible,
            qat.gate.paired_statistics.tango_score(n, lost, np.minimum(gained, n - lost), drop),
            np.nan,
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
    region = qat.gate.paired_statistics.Region(n, limit, 0.95)
    score = qat.gate.paired_statistics.tango_score(n, lost.astype(float), gained.astype(float), limit)
    smaller = (1 - abs(drop)) / 2 * where
    p_lost, p_gained = smaller + max(drop, 0), smaller + max(-drop, 0)
    chance = probabilities(n, np.array([p_lost]), np.array([p_gained]))[0]
    assert region.chance(p_lost, p_gained) == pytest.approx(chance[score >= norm.ppf(0.95)].sum(), abs=1e-7)


@pytest.mark.parametrize(
    ("n", "drop"),
    [
        *((361, drop) for drop in (-0.02, 0.0, 0.005)),
        *(exhaustive(2000, drop) for drop in (-0.02, 0.0, 0.005)),
        pytest.param(20_000, 0.0, marks=pytest.mark.slow),
        *(exhaustive(20_000, drop) for drop in (-0.02, 0.005)),
    ],
)
def test_on_a_far_finer_grid_too_the_region_keeps_the_error_rate_and_a_larger_one_does_not(
    n: int, drop: float
) -> None:
    region = qat.gate.paired_statistics.critical_region(n, drop, 0.95)
    one_more = qat.gate.paired_statistics.Region(n, region.limit - 1e-9, 0.95)
    p_lost, p_gained = line(-drop, 900 if n < 20_000 else 200)
    assert region.probability(p_lost, p_gained).max() <= 0.05
    assert one_more.probability(p_lost, p_gained).max() > 0.05 * (1 - 1e-3)


def fails(n: int, lost: Counts, gained: Counts, max_drop: float, confidence: float) -> NDArray[np.bool_]:
    region = qat.gate.paired_statistics.critical_region(n, max_drop, confidence)
    return gained <= region.thresholds(lost.astype(np.float64))


def passes(n: int, lost: Counts, gained: Counts, max_drop: float, confidence: float) -> NDArray[np.bool_]:
    region = qat.gate.paired_statistics.critical_region(n, -max_drop, confidence)
    return lost <= region.thresholds(gained.astype(np.float64))


@pytest.mark.parametrize(("n", "all_lost"), [(360, [0, 3, 9, 25]), exhaustive(2000, [25, 60, 120])])
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
