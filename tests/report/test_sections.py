"""Sections on results: the verdict in words, accuracies, curves, classes, images."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from qat.evaluation import points
from qat.gate.paired_statistics import Pairs, accuracy_interval
from qat.report.sections import (
    accuracy_figure,
    change_interval,
    comparison_table,
    confused_table,
    confusion_figure,
    curves,
    gallery,
    interval_text,
    verdict,
)
from tests.helpers.reports import answers


def pair(lost: int, gained: int, both_wrong: int = 0, n: int = 100) -> object:
    """Answers of two networks: ``both_wrong`` images have two wrong answers, the others are right twice."""
    labels = [0] * n
    before = [0] * lost + [1] * gained + [1] * both_wrong
    after = [1] * lost + [0] * gained + [2] * both_wrong
    rest = [0] * (n - len(before))
    return answers(labels, after + rest, before + rest)


@pytest.mark.parametrize(
    ("lost", "gained", "wrong", "start", "middle"),
    [
        (
            0,
            0,
            0,
            "int8 is as accurate as float rest: both classify 100.00 % of 100 test images correctly.",
            "No",
        ),
        (
            2,
            2,
            0,
            "int8 is as accurate as float rest: both classify 98.00 %",
            "4 images changed class: 2 became",
        ),
        (
            3,
            1,
            0,
            "int8 loses 2.00 points of top-1 accuracy: 99.00 % → 97.00 % of 100",
            "1 became right, 3 beca",
        ),
        (
            0,
            1,
            0,
            "int8 gains 1.00 points of top-1 accuracy: 99.00 % → 100.00 % of 100",
            "1 image changed its cla",
        ),
        (
            0,
            0,
            2,
            "int8 is as accurate as float rest: both classify 98.00 %",
            "0 became wrong, 2 are wrong both",
        ),
    ],
)
def test_the_verdict_says_what_quantization_changed(
    lost: int, gained: int, wrong: int, start: str, middle: str
) -> None:
    text = verdict(pair(lost, gained, wrong), "int8")  # type: ignore[arg-type]
    assert text.startswith(start)
    assert middle in text
    low, high = (100 * bound for bound in change_interval(Pairs(100, lost, gained)))
    assert (
        f"With 95 % confidence, the true change lies between {points(low)} and {points(high)} points." in text
    )


def test_the_verdict_on_one_network_compares_nothing() -> None:
    one = answers([0, 1], [0, 2])
    assert verdict(one, None) == "The binary network classifies 50.00 % of 2 test images correctly."
    alone = verdict(one, "int4/int8")
    assert alone.startswith("The int4/int8 network classifies 50.00 %")
    assert "isn't there to compare" in alone


def test_points_have_a_sign_unless_they_are_none() -> None:
    assert [points(change) for change in (0.28, -0.28, 0.0, -1e-7)] == ["+0.28", "−0.28", "0.00", "0.00"]


def test_intervals_are_clopper_pearsons_and_stay_on_one_line() -> None:
    low, high = accuracy_interval(357, 360)
    for correct, text in (
        (357, f"{100 * low:.2f} – {100 * high:.2f} %"),
        (360, "98.98 – 100.00 %"),  # from 0.025 ** (1 / 360): errors may be there that were not seen
    ):
        found = interval_text(correct, 360)
        assert " " not in found
        assert found.replace("\u00a0", " ").replace("\u2060", "") == text


def test_images_are_counted_by_both_answers() -> None:
    table = comparison_table(pair(3, 1, 2), "int8")  # type: ignore[arg-type]
    assert table is not None
    assert [row[:2] for row in table.rows] == [
        ("right both times", "94"),
        ("became right", "1"),
        ("became wrong", "3"),
        ("wrong both times", "2"),
        ("McNemar’s exact test", "p = 0.62"),
    ]
    assert comparison_table(answers([0], [0]), "int8") is None


def test_each_stage_has_a_bar_with_its_interval() -> None:
    found = pair(1, 0)
    chart = accuracy_figure(found, {"calibrated": {"top1": 98.0, "n": 100}}, "int8").chart  # type: ignore[arg-type]
    for text in (
        "float rest, before quantization",
        "100.00 %",
        "int8, calibrated only",
        "98.00 %",
        "99.00 %",
    ):
        assert f">{text}</text>" in chart
    assert chart.count("stroke: var(--ink)") >= 3


@pytest.mark.parametrize("calibrated", [None, 3, {}, {"top1": "a", "n": 100}, {"top1": 98.0, "n": 99}])
def test_a_calibrated_accuracy_that_cannot_be_used_is_left_out(calibrated: object) -> None:
    chart = accuracy_figure(pair(1, 0), {"calibrated": calibrated}, "int8").chart  # type: ignore[arg-type]
    assert "calibrated" not in chart


def test_a_poor_accuracy_is_drawn_from_zero() -> None:
    figure = accuracy_figure(answers([0] * 10, [1] * 9 + [0]), {}, None)
    assert "begins" not in figure.note
    assert ">binary</text>" in figure.chart


# Curves


def test_curves_show_loss_accuracy_and_learning_rate() -> None:
    rows = [
        {"epoch": n, "loss": 1 / n, "test_loss": 2 / n, "top1": 90, "test_top1": 91, "learning_rate": 0.1}
        for n in (1, 2)
    ]
    assert [one.title for one in curves(rows, 92.0)] == ["Loss", "Accuracy", "Learning rate"]
    assert ">float rest</text>" in curves(rows, 92.0)[1].chart
    assert ">float rest</text>" not in curves(rows, None)[1].chart


def test_a_temperature_that_changes_has_a_curve() -> None:
    rows = [{"epoch": n, "temperature": 10.0**-n} for n in (1, 2, 3)]
    assert [one.title for one in curves(rows, None)][-1] == "Weight temperature"
    assert [one.title for one in curves(rows[:1], None)][-1] == "Learning rate"


def test_without_an_epoch_there_are_no_curves() -> None:
    assert curves([], 99.0) == []
    assert curves([{"loss": 1.0}, {"epoch": "x"}], 99.0) == []


def test_numbers_beyond_all_measuring_are_drawn_or_left_out() -> None:
    rows: list[dict[str, Any]] = [
        {"epoch": 1, "loss": -1e308, "learning_rate": 9e14, "temperature": 0},
        {"epoch": 9e14, "loss": 1e308, "learning_rate": -9e14, "temperature": 1e-300},
        {"epoch": 10**400, "loss": 1},
    ]
    assert [figure.title for figure in curves(rows, None)] == [
        "Loss",
        "Accuracy",
        "Learning rate",
        "Weight temperature",
    ]


def test_numbers_that_are_none_leave_gaps() -> None:
    rows = [{"epoch": n, "loss": value} for n, value in enumerate([1.0, math.nan, None, "x", True, 2.0])]
    chart = curves(rows, None)[0].chart
    assert chart.count("<use") == 2 + 1  # two points, and the legend's


# Classes


def test_up_to_forty_classes_are_drawn() -> None:
    for count, drawn in ((40, True), (41, False)):
        found = answers([0, 1], [0, 2], names=[str(index) for index in range(count)])
        assert (confusion_figure(found) is not None) is drawn


def test_confused_pairs_are_named_with_the_share_of_the_class() -> None:
    table = confused_table(answers([3, 3, 3, 3, 1], [2, 2, 3, 3, 3]))
    assert table is not None
    assert [tuple(row) for row in table.rows] == [("3", "2", "2", "50.0 %"), ("1", "3", "1", "100.0 %")]
    assert confused_table(answers([1], [1])) is None


def test_the_gallery_names_what_happened_to_an_image() -> None:
    found = gallery(answers([0, 1, 2], [1, 1, 1], [0, 2, 0]))
    assert [(one.outcome, one.tone, one.true, one.before, one.after, one.number) for one in found] == [
        ("became wrong", "bad", "0", "0", "1", 1),
        ("became right", "good", "1", "2", "1", 2),
        ("wrong both times", "muted", "2", "0", "1", 3),
    ]
    assert all(re.match("data:image/png;base64,", one.image.uri) for one in found)
