"""How many images show a drop, and which drop shows on so many."""

from __future__ import annotations

import math

import pytest
from scipy.stats import norm

import qat.gate.paired_statistics
from qat.gate.paired_statistics import detectable_drop, images_needed, power_to_fail, power_to_pass
from tests.helpers.cases import exhaustive, slow


@pytest.mark.parametrize(
    ("discordance", "max_drop", "confidence", "power"),
    [
        (0.02, 0.03, 0.95, 0.8),
        exhaustive(0.05, 0.03, 0.95, 0.8),
        slow(0.05, 0.02, 0.9, 0.9),
        slow(0.2, 0.03, 0.95, 0.8),
        slow(0.02, 0.01, 0.95, 0.5),
        exhaustive(0.005, 0.0025, 0.95, 0.8),
        exhaustive(0.2, 0.01, 0.99, 0.8),
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
    [exhaustive(0.2, 0.005), exhaustive(0.2, 0.0025), (0.05, 0.001), exhaustive(0.02, 0.0005)],
)
def test_images_needed_agree_with_the_normal_formula_where_they_are_many(
    discordance: float, max_drop: float
) -> None:
    wanted = (norm.ppf(0.95) + norm.ppf(0.8)) ** 2 * discordance / max_drop**2
    assert images_needed(discordance, max_drop, 0.95) == pytest.approx(wanted, rel=0.025)


@pytest.mark.slow
@pytest.mark.parametrize(("discordance", "max_drop"), [(0.005, 0.00075), exhaustive(0.02, 0.0015)])
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
