"""The accuracy gate's verdicts: each one, their order, and what they say."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from qat.errors import BaselineError, GateError
from qat.evaluation import points
from qat.gate import decision as gate
from qat.gate.decision import Decision, judge
from qat.gate.paired_statistics import (
    Pairs,
    detectable_drop,
    images_needed,
    lower_bound,
    mcnemar_p,
    upper_bound,
)
from qat.gate.rules import Rules
from tests.helpers.recorded_baselines import baseline


@pytest.fixture(autouse=True, scope="module")
def _no_bound_is_computed_twice() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lower_bound", "upper_bound", "images_needed", "detectable_drop"):
            patch.setattr(gate, name, functools.cache(getattr(gate, name)))
        yield


def decide(n: int, lost: int, gained: int, sha: str = "b", **rules: Any) -> Decision:
    """The baseline has the first ``gained`` images wrong, the model the last ``lost``."""
    return judge(baseline(n, range(gained)), baseline(n, range(n - lost, n), sha=sha), Rules(**rules))


# Verdicts


def test_images_are_paired_and_the_bounds_are_those_of_the_statistics_in_points() -> None:
    found = decide(360, 12, 5, confidence=0.9, max_drop=10)
    pairs = Pairs(360, 12, 5)
    assert found.pairs == pairs
    assert found.p == mcnemar_p(pairs)
    assert found.lower == 100 * lower_bound(pairs, 0.9)
    assert found.upper == 100 * upper_bound(pairs, 0.9)
    assert found.lower < 100 * pairs.change < found.upper


def test_images_that_both_have_wrong_or_right_say_nothing() -> None:
    found = judge(baseline(360, [1, 2, 3]), baseline(360, [2, 3, 4], sha="b"), Rules(max_drop=10))
    assert found.pairs == Pairs(360, 1, 1)


def test_a_model_that_surely_lost_no_more_than_is_allowed_passes() -> None:
    found = decide(360, 3, 2, max_drop=2.5)
    assert (found.verdict, found.passes) == ("pass", True)
    assert -2.5 <= found.lower < 0
    assert found.reason == (
        "top-1 fell by 0.28 points (5 of 360 images changed sides: 3 became wrong, 2 right); with 95 % "
        "confidence, it did not fall by more than "
        f"{-found.lower:.2f}, and 2.5 is allowed"
    )
    found.require()


def test_a_model_that_surely_lost_more_fails() -> None:
    found = decide(360, 60, 2)
    assert (found.verdict, found.passes) == ("fail", False)
    assert found.upper < -1
    assert found.reason == (
        "top-1 fell by 16.11 points (62 of 360 images changed sides: 60 became wrong, 2 right); with 95 % "
        f"confidence, by at least {-found.upper:.2f}, and 1 is allowed"
    )
    with pytest.raises(GateError, match=r"^fail: top-1 fell by 16\.11 points"):
        found.require()
    assert GateError.exit_code == 1


def test_a_model_that_surely_gained_is_improved_and_passes() -> None:
    found = decide(360, 1, 20)
    assert (found.verdict, found.passes) == ("improved", True)
    assert found.lower > 0
    assert found.reason == (
        "top-1 rose by 5.28 points (21 of 360 images changed sides: 1 became wrong, 20 right); with 95 % "
        "confidence, it is better than the baseline's"
    )


@pytest.mark.parametrize(("rule", "passes"), [("measured", True), ("pass", True), ("fail", False)])
def test_too_few_images_are_inconclusive_and_say_how_many_would_tell(rule: str, passes: bool) -> None:
    found = decide(360, 3, 2, on_inconclusive=rule)
    assert (found.verdict, found.passes) == ("inconclusive", passes)
    assert found.lower < -1 <= found.upper
    needed, drop = images_needed(5 / 360, 0.01, 0.95), detectable_drop(360, 5 / 360, 0.01, 0.95)
    assert needed is not None
    assert drop is not None
    assert needed > 360
    assert (found.needed, found.detectable) == (needed, 100 * drop)
    assert found.reason == (
        "top-1 fell by 0.28 points (5 of 360 images changed sides: 3 became wrong, 2 right), and 1 is "
        f"allowed, but a larger drop may hide: the real change is from {points(found.lower)} to "
        f"{points(found.upper)} (each bound with 95 % confidence), and the data can't tell; about "
        f"{needed:,} images could, if the model is as good as the baseline"
    )
    assert found.headline == "inconclusive, measured drop within what is allowed"
    assert ("drop that surely fails, 80% of the time", f"{100 * drop:.2f}", "") in found.rows()


@pytest.mark.parametrize(("rule", "passes"), [("measured", False), ("pass", True), ("fail", False)])
def test_a_measured_drop_above_the_limit_fails_though_it_may_be_chance_and_says_so(
    rule: str, passes: bool
) -> None:
    found = decide(360, 5, 0, on_inconclusive=rule)
    assert (found.verdict, found.exceeds, found.passes) == ("inconclusive", True, passes)
    assert found.upper >= -1
    assert found.headline == "inconclusive, measured drop above what is allowed"
    assert found.reason.startswith(
        "top-1 fell by 1.39 points (5 of 360 images changed sides: 5 became wrong, 0 right), and 1 is "
        f"allowed, which may be chance: the real change is from {points(found.lower)} to "
        f"{points(found.upper)} (each bound with 95 % confidence), and the data can't tell; about "
    )
    assert json.loads(found.to_json())["measured_drop_exceeds"] is True
    if not passes:
        with pytest.raises(
            GateError, match=r"^inconclusive, measured drop above what is allowed: top-1 fell"
        ):
            found.require()


@pytest.mark.parametrize(
    ("images", "lost", "max_drop", "exceeds"),
    [
        (100, 1, 1.0, False),
        (100, 2, 1.99, True),
        (1000, 3, 0.3, False),
        (1000, 3, 0.2999999999999, True),
        (360, 3, 1.0, False),
        (360, 4, 1.0, True),
        (360, 2, 0.0, True),
        (300, 1, 0.3333333333333333, True),
    ],
)
def test_a_measured_drop_of_just_what_is_allowed_does_not_exceed_it(
    images: int, lost: int, max_drop: float, exceeds: bool
) -> None:
    assert decide(images, lost, 0, max_drop=max_drop).exceeds is exceeds


@pytest.mark.parametrize(
    ("right", "percent", "lost", "exceeds"),
    [(500, 1.0, 5, False), (500, 1.0, 6, True), (700, 0.7, 4, False), (700, 0.7, 5, True), (0, 50, 0, False)],
)
def test_a_relative_drop_is_a_share_of_what_the_baseline_has_right(
    right: int, percent: float, lost: int, exceeds: bool
) -> None:
    images = 1000
    before = baseline(images, range(right, images))
    now = baseline(images, [*range(lost), *range(right, images)], sha="b")
    found = judge(before, now, Rules(max_relative_drop=percent))
    assert (found.exceeds, float(found.limit)) == (exceeds, pytest.approx(percent * right / images))
    assert found.passes is not exceeds
    shown = json.loads(found.to_json())
    assert (shown["max_relative_drop"], shown["max_drop"]) == (percent, float(found.limit))
    if lost:
        text = f"and {float(found.limit):.4g} ({percent:g} % of the baseline's {right / 10:.2f} %) is allowed"
        assert text in found.reason
        rows = {what: bound for what, _, bound in found.rows()}
        assert rows["change of top-1, points"] == f"≥ {points(-float(found.limit))}"


def test_images_that_would_pass_an_equal_model_are_not_said_to_be_too_few() -> None:
    found = decide(5000, 50, 0)
    assert found.verdict == "inconclusive"
    assert found.needed is not None
    assert found.needed < 5000
    assert found.reason.endswith(
        f"a model as good as the baseline usually passes with about {found.needed:,} images, so this one is "
        "likely worse, but near what is allowed"
    )


def test_where_no_number_of_images_would_tell_it_says_so() -> None:
    found = decide(360, 1, 1, max_drop=0)
    assert found.verdict == "inconclusive"
    assert found.needed is None
    assert found.reason.endswith("; no number of images could")
    assert json.loads(found.to_json())["images_needed"] is None


def test_what_only_an_inconclusive_comparison_needs_is_not_computed_otherwise() -> None:
    for found in (decide(360, 3, 2, max_drop=2.5), decide(360, 60, 2), decide(360, 1, 20)):
        assert found.needed is found.detectable is None


# Their order


def test_a_broken_floor_fails_a_model_whatever_the_comparison_says() -> None:
    cases = ((3, 2, 2.5, "pass"), (1, 20, 1, "improved"), (60, 2, 1, "fail"), (3, 2, 1, "inconclusive"))
    for lost, gained, max_drop, comparison in cases:
        found = decide(360, lost, gained, max_drop=max_drop, floor=99.99)
        assert (found.comparison, found.verdict, found.passes) == (comparison, "fail", False)
        assert found.reason.startswith(f"top-1 is {100 - lost / 3.6:.2f} %, below the floor of 99.99 %")
        assert ("; top-1 fell by" in found.reason) is (comparison == "fail")
    same = judge(baseline(100, [1]), baseline(100, [1]), Rules(floor=99.5))
    assert (same.comparison, same.verdict) == ("pass", "fail")


def test_the_floor_is_compared_with_the_exact_accuracy_and_may_be_reached() -> None:
    three = baseline(300, [0, 1], sha="b")  # 99.3333…, stored as 99.3333
    anything = functools.partial(Rules, max_drop=100)
    assert judge(baseline(300), three, anything(floor=99.33333)).floor_broken is False
    assert judge(baseline(300), three, anything(floor=99.33334)).floor_broken is True
    assert judge(baseline(100), baseline(100, [0]), anything(floor=99)).floor_broken is False
    assert judge(baseline(100), baseline(100, [0]), anything()).floor_reason == ""


def test_equal_answers_pass_whatever_the_file_and_however_few_images_there_are() -> None:
    found = decide(5, 0, 0, sha="a")
    assert (found.verdict, found.lower < -1) == ("pass", True)
    assert found.reason == "the same file as the baseline's, with the same answers"
    for rule in ("measured", "pass", "fail"):
        other = decide(5, 0, 0, sha="b", max_drop=0, on_inconclusive=rule)
        assert (other.verdict, other.passes) == ("pass", True)
        assert other.reason == "the same images are right as the baseline's: 0 of 5 changed sides"
    assert decide(5, 1, 0, sha="a").verdict == "inconclusive"  # the same file, on another machine


def test_the_allowed_drop_and_the_confidence_decide() -> None:
    assert decide(360, 3, 2, max_drop=10).verdict == "pass"
    assert decide(360, 20, 2, max_drop=1).verdict == "fail"
    assert decide(360, 20, 2, max_drop=1, confidence=0.9999).verdict == "inconclusive"
    assert decide(360, 1, 20, max_drop=0).verdict == "improved"
    assert decide(360, 1, 20, max_drop=0, confidence=0.999999).verdict == "inconclusive"


def test_other_data_is_refused_not_compared() -> None:
    with pytest.raises(BaselineError, match=r"the baseline cannot be compared with: data\.image_size"):
        judge(baseline(), baseline(data={"image_size": 32}), Rules())
    assert BaselineError.exit_code == 2


# What is asked


@pytest.mark.parametrize(
    ("rules", "part"),
    [
        ({"max_drop": -0.1}, "-0.1 is not a drop in percentage points, 0 to 100"),
        ({"max_drop": 100.5}, "100.5 is not a drop"),
        ({"max_drop": math.nan}, "nan is not a drop"),
        ({"max_relative_drop": -1}, "-1 is not a drop in percent of the baseline's top-1, 0 to 100"),
        ({"max_relative_drop": math.nan}, "nan is not a drop in percent of"),
        ({"max_drop": 1, "max_relative_drop": 1}, "exclude each other: give one"),
        ({"on_inconclusive": "maybe"}, "'maybe' is not one of measured, pass, fail"),
        ({"confidence": 95}, "95 is not a share between 0.5 and 1, both excluded: write 0.95"),
        ({"confidence": 99.9}, "write 0.999"),
        ({"confidence": 0.5}, "0.5 is not a share between 0.5 and 1, both excluded, such as 0.95"),
        ({"confidence": 1.0}, "1 is not a share"),
        ({"confidence": math.nan}, "nan is not a share"),
        ({"floor": -1}, "-1 is not an accuracy in percent, 0 to 100"),
        ({"floor": math.inf}, "inf is not an accuracy"),
    ],
)
def test_rules_out_of_range_say_what_is_allowed(rules: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Rules(**rules)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    assert Rules(max_drop=0, floor=0, confidence=0.501) != Rules(max_drop=100, floor=100, confidence=0.999)


# What is shown


def test_the_table_has_a_row_for_each_figure_and_the_bounds_that_decide() -> None:
    found = decide(1200, 3, 2, max_drop=2.5, floor=98.5)
    rows = {what: (value, bound) for what, value, bound in found.rows()}
    assert rows["images"] == ("1,200", "")
    assert rows["top-1, baseline"] == ("99.83 %", "")
    assert rows["top-1, this model"] == ("99.75 %", "≥ 98.5 %")
    assert rows["images that only the baseline has right"] == ("3", "")
    assert rows["images that only this model has right"] == ("2", "")
    assert rows["images that changed sides"] == ("5", "")
    assert rows["change of top-1, points"] == ("−0.08", "≥ −2.50")
    assert rows["change, at least (95 % sure)"] == (points(found.lower), "≥ −2.50 passes")
    assert rows["change, at most (95 % sure)"] == (points(found.upper), "< −2.50 fails")


def test_neither_a_confidence_nor_a_change_is_rounded_to_one_that_it_is_not() -> None:
    found = decide(21_000, 1, 0, confidence=0.9999999)
    assert found.reason.startswith("top-1 fell by less than 0.01 points (1 of 21,000 images changed sides: ")
    assert "; with 99.99999 % confidence, " in found.reason
    assert "change, at least (99.99999 % sure)" in [row[0] for row in found.rows()]
    assert decide(360, 3, 2, confidence=0.57, max_drop=5).reason.count("with 57 % confidence") == 1


def test_json_has_figures_rules_and_both_models() -> None:
    found = json.loads(decide(360, 3, 2, floor=90.0, confidence=0.9).to_json())
    assert found["verdict"] == "inconclusive"
    assert found["passes"] is True
    assert (found["images"], found["pairs"], found["lost"], found["gained"]) == (360, 5, 3, 2)
    assert found["flips"] is None
    assert (found["max_relative_drop"], found["measured_drop_exceeds"]) == (None, False)
    assert found["on_inconclusive"] == "measured"
    assert (found["top1"], found["baseline_top1"]) == (99.1667, 99.4444)
    assert found["change"] == pytest.approx(-1 / 3.6)
    assert found["change_at_least"] < found["change"] < found["change_at_most"]
    assert (found["max_drop"], found["confidence"], found["floor"]) == (1.0, 0.9, 90.0)
    assert (found["model"]["sha256"], found["baseline"]["sha256"]) == ("b" * 64, "a" * 64)
    assert found["baseline"]["recorded"] == "2026-01-02T03:04:05Z"


def test_the_verdict_carries_what_else_differs() -> None:
    found = judge(baseline(versions={"torch": "2.11.0"}), baseline(versions={"torch": "2.12.0"}), Rules())
    assert found.verdict == "pass"
    (text,) = found.warnings
    assert "torch 2.12.0 (2.11.0)" in text
    assert json.loads(found.to_json())["warnings"] == [text]


@pytest.mark.parametrize(
    ("change", "text"), [(0.284, "+0.28"), (-1.3, "−1.30"), (0.0, "0.00"), (-0.001, "0.00"), (0.004, "0.00")]
)
def test_a_change_has_a_sign_unless_it_rounds_to_nothing(change: float, text: str) -> None:
    assert points(change) == text
