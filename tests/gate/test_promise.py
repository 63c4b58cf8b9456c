"""The promise of the gate: with ``--on-inconclusive pass`` a model that is no worse fails in at most 5 %.

Every outcome of few images is judged by the gate itself, and its probability added up under many true shares.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, multinomial

from qat.gate import decision as gate
from qat.gate.decision import judge
from qat.gate.paired_statistics import Pairs, lower_bound, upper_bound
from qat.gate.rules import OnInconclusive, Rules
from tests.helpers.cases import exhaustive
from tests.helpers.paths import ROOT
from tests.helpers.recorded_baselines import baseline


@pytest.fixture(autouse=True, scope="module")
def _bounds_alone_are_computed_and_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lower_bound", "upper_bound"):
            patch.setattr(gate, name, functools.cache(getattr(gate, name)))
        for name in ("images_needed", "detectable_drop"):
            patch.setattr(gate, name, lambda *_: None)
        yield


def failing(n: int, rules: Rules) -> NDArray[np.int64]:
    """Outcomes that end with 1: (both right, lost, gained, both wrong) images, (outcomes, 4)."""
    found = []
    for both, lost, gained in itertools.product(range(n + 1), repeat=3):
        if both + lost + gained > n:
            continue
        before = baseline(n, range(both + lost, n))
        now = baseline(n, [*range(both, both + lost), *range(both + lost + gained, n)], sha="b")
        if not judge(before, now, rules).passes:
            found.append((both, lost, gained, n - both - lost - gained))
    return np.array(found, np.int64).reshape(-1, 4)


def shares(drop: float) -> Iterator[list[float]]:
    """True shares (both right, lost, gained, both wrong) of models with that drop."""
    for smaller in (1 - abs(drop)) / 2 * np.sin(np.linspace(0, math.pi / 2, 25)) ** 2.3:
        lost, gained = smaller + max(drop, 0), smaller + max(-drop, 0)
        rest = max(1 - lost - gained, 0.0)
        for both in (0.0, 0.3, 0.9, 1.0):
            yield [both * rest, lost, gained, rest - both * rest]


def rate(outcomes: NDArray[np.int64], n: int, true: list[float]) -> float:
    return float(multinomial.pmf(outcomes, n, true).sum()) if len(outcomes) else 0.0


@pytest.mark.parametrize("n", [8, exhaustive(14)])
@pytest.mark.parametrize("max_drop", [0.0, 5.0])
def test_with_on_inconclusive_pass_a_model_that_is_no_worse_fails_in_at_most_5_percent(
    n: int, max_drop: float
) -> None:
    outcomes = failing(n, Rules(max_drop=max_drop, on_inconclusive="pass"))
    assert len(outcomes)
    for drop in (max_drop / 100, 0.0, -0.1):
        assert max(rate(outcomes, n, true) for true in shares(drop)) <= 0.05 + 1e-9


@pytest.mark.parametrize("n", [8, exhaustive(14)])
@pytest.mark.parametrize("relative", [5.0, 20.0])
def test_it_holds_for_a_relative_drop_in_points_of_the_baseline_at_hand(n: int, relative: float) -> None:
    """The limit depends on what the baseline has right, by chance too: counted is a fail within the limit."""
    rules = Rules(max_relative_drop=relative, on_inconclusive="pass")
    outcomes = failing(n, rules)
    assert len(outcomes)
    limits = np.array([float(rules.limit(int(both + lost), n)) for both, lost, _, _ in outcomes])
    for drop in (0.0, 0.02, 0.05, 0.2):
        wrong = outcomes[limits >= 100 * drop]
        assert max(rate(wrong, n, true) for true in shares(drop)) <= 0.05 + 1e-9


@pytest.mark.parametrize("rule", ["measured", "fail"])
def test_it_is_a_promise_of_pass_alone(rule: OnInconclusive) -> None:
    """What is measured fails more often by chance, as docs/ci.md says."""
    outcomes = failing(8, Rules(max_drop=5.0, on_inconclusive=rule))
    assert max(rate(outcomes, 8, true) for true in shares(0.0)) > 0.2


def test_the_rates_by_chance_in_the_documentation_are_right() -> None:
    """Of models as good as the baseline, by images and by the share that changes sides: percent that fail."""
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8").split("the default fails:\n\n")[1]
    heading, _, *rows = [re.findall(r"\d+(?:[.,]\d+)*", line) for line in text.split("\n\n")[0].splitlines()]
    assert len(rows) == 3
    for images, first, *more in rows:
        n = int(images.replace(",", ""))
        stated = [float(one) for one in (first, *more) if one != "100"]  # "of 100"
        for share, expected in zip(heading, stated, strict=True):
            changed = np.arange(n + 1)
            most_gained = np.ceil((changed - n / 100) / 2) - 1  # lost - gained > n / 100
            fails = binom.pmf(changed, n, float(share) / 100) * binom.cdf(most_gained, changed, 0.5)
            assert 100 * fails.sum() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("confidence", [0.5001, 0.95])
def test_the_bounds_enclose_the_measured_change_so_no_verdict_contradicts_it(confidence: float) -> None:
    for n in (1, 2, 5, 8):
        for lost, gained in itertools.product(range(n + 1), repeat=2):
            if lost + gained <= n:
                pairs = Pairs(n, lost, gained)
                assert lower_bound(pairs, confidence) <= pairs.change <= upper_bound(pairs, confidence)
