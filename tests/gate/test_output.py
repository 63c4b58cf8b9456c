"""JUnit XML and Markdown of the accuracy gate: every verdict, and text that would break either."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from qat.gate.decision import Decision, Verdict
from qat.gate.flips import Flip, Flips
from qat.gate.output import (
    append_outputs,
    append_summary,
    junit,
    junit_of_error,
    markdown,
    markdown_of_error,
)
from qat.gate.paired_statistics import Pairs
from qat.gate.rules import OnInconclusive, Rules
from tests.helpers.recorded_baselines import baseline

#: Control characters, half of a surrogate pair, markup, and a line end.
HOSTILE = "a\x00b\x1b[31m \ud800 </failure>]]>&\"'|`_*\nnext \ufffe 😀"

#: What a comparison of 100 images with 2 that became wrong is called where it can't tell.
ABOVE = "inconclusive, measured drop above what is allowed"
FLIPS = Flips(
    1,
    1,
    (
        Flip(7, "cat/`<7>`.png", "wrong", "cat", "cat", "dog"),
        Flip(9, None, "right", "dog", None, "dog"),
    ),
)


def decision(
    comparison: Verdict,
    *,
    floor: float | None = None,
    floor_broken: bool = False,
    on_inconclusive: OnInconclusive = "pass",
    warnings: tuple[str, ...] = (),
    **changes: Any,
) -> Decision:
    """A decision with that comparison; its other figures are made up."""
    content = {
        "baseline": baseline(100),
        "observed": baseline(100, [0, 1], sha="b"),
        "rules": Rules(floor=floor, on_inconclusive=on_inconclusive),
        "pairs": Pairs(100, 2, 0),
        "p": 0.5,
        "lower": -6.0,
        "upper": 0.5,
        "needed": 741,
        "detectable": 3.5,
    }
    return Decision(
        **(content | changes), comparison=comparison, floor_broken=floor_broken, warnings=warnings
    )


def parsed(text: str) -> tuple[ET.Element, list[ET.Element]]:
    """The one test suite in JUnit XML, whose counts are checked, and its test cases."""
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n<testsuites ')
    root = ET.fromstring(text.encode())
    (suite,) = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    cases = list(suite)
    assert {case.tag for case in cases} == {"testcase"}
    for element in (root, suite):
        assert element.get("tests") == str(len(cases))
        for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert element.get(count) == str(sum(case.find(tag) is not None for case in cases)), count
        assert float(element.get("time", "")) >= 0
    assert all(
        case.get("classname") == "qat gate" and case.get("name") and case.get("time") for case in cases
    )
    return suite, cases


def outcome(case: ET.Element) -> str:
    """The tag of a test case's outcome; empty where it passed."""
    (tag,) = {child.tag for child in case} - {"system-out"} or {""}
    return tag


# JUnit


@pytest.mark.parametrize(
    ("comparison", "on_inconclusive", "tag"),
    [
        ("pass", "pass", ""),
        ("improved", "fail", ""),
        ("fail", "pass", "failure"),
        ("inconclusive", "pass", "skipped"),
        ("inconclusive", "fail", "failure"),
        ("inconclusive", "measured", "failure"),
        ("pass", "measured", ""),
    ],
)
def test_each_verdict_has_its_outcome(comparison: Verdict, on_inconclusive: OnInconclusive, tag: str) -> None:
    made = decision(comparison, on_inconclusive=on_inconclusive)
    suite, (case,) = parsed(junit(made, 1.25))
    assert outcome(case) == tag
    assert suite.get("time") == case.get("time") == "1.250"
    if tag:
        assert case.find(tag).get("message") == f"{made.headline}: {made.reason}"  # type: ignore[union-attr]


@pytest.mark.parametrize(("broken", "tag"), [(True, "failure"), (False, "")])
def test_a_floor_is_a_test_of_its_own(broken: bool, tag: str) -> None:
    _, (comparison, floor) = parsed(junit(decision("pass", floor=98.5, floor_broken=broken), 1.0))
    assert (outcome(comparison), outcome(floor)) == ("", tag)
    assert (comparison.get("name"), floor.get("name")) == (
        "top-1 against the baseline",
        "top-1 against the floor",
    )
    if broken:
        assert "below the floor of 98.5 %" in (floor.findtext("failure") or "")


def test_what_was_printed_and_warned_of_is_among_the_output() -> None:
    made = decision("pass", warnings=("another processor", "other versions"))
    _, (case,) = parsed(junit(made, 1.0))
    lines = (case.findtext("system-out") or "").splitlines()
    assert lines[:3] == [f"pass: {made.reason}", "warning: another processor", "warning: other versions"]
    assert "images: 100" in lines
    assert "change, at least (95 % sure): −6.00 (≥ −1.00 passes)" in lines


def test_every_format_names_verdict_measured_drop_bounds_and_pairs() -> None:
    made = decision("inconclusive", on_inconclusive="measured")
    for text in (junit(made, 1.0), markdown(made, "m.onnx", "record"), made.to_json()):
        plain = text.replace("\\", "")
        for part in (
            "inconclusive",
            "fell by 2.00 points",
            "(2 of 100 images changed sides: 2 became wrong, 0 r",
        ):
            assert part in plain
        for bound in (made.lower, made.upper):
            assert f"{abs(bound):.2f}" in plain


def test_images_that_changed_sides_are_listed_where_they_were_asked_for() -> None:
    made = decision("pass", flips=FLIPS)
    _, (case,) = parsed(junit(made, 1.0))
    lines = [
        "images that changed sides: 1 right → wrong, 1 wrong → right",
        "right → wrong: image 7 (cat/`<7>`.png) of class cat, now dog",
        "wrong → right: image 9 of class dog",
    ]
    assert (case.findtext("system-out") or "").splitlines()[-3:] == lines
    assert "\n".join(["```", *lines, "```"]) in markdown(made, "m", "record")
    assert "right → wrong" not in markdown(decision("pass"), "m", "record") + junit(decision("pass"), 1.0)


def test_a_floor_that_breaks_leaves_the_comparison_its_own_outcome() -> None:
    made = decision(
        "inconclusive", on_inconclusive="measured", pairs=Pairs(100, 1, 0), floor=99, floor_broken=True
    )
    _, (comparison, floor) = parsed(junit(made, 1.0))
    assert (outcome(comparison), outcome(floor)) == ("skipped", "failure")


def test_a_refusal_is_an_error() -> None:
    _, (case,) = parsed(junit_of_error("b.json: top1: is missing", 0.5))
    assert outcome(case) == "error"
    error = case.find("error")
    assert error is not None
    assert error.get("message") == error.text == "b.json: top1: is missing"


def test_no_text_breaks_the_xml() -> None:
    for text in (junit(decision("fail", warnings=(HOSTILE,)), 1.0), junit_of_error(HOSTILE, 1.0)):
        _, (case,) = parsed(text)
        shown = "".join(case.itertext())
        assert "a\ufffdb\ufffd[31m \ufffd </failure>]]>&\"'|`_*\nnext \ufffd 😀" in shown


# Markdown


@pytest.mark.parametrize(
    ("comparison", "on_inconclusive", "heading"),
    [
        ("pass", "pass", "### ✅ Accuracy gate: pass"),
        ("improved", "pass", "### ✅ Accuracy gate: improved"),
        ("fail", "pass", "### ❌ Accuracy gate: fail"),
        ("inconclusive", "pass", f"### ⚠️ Accuracy gate: {ABOVE}"),
        ("inconclusive", "fail", f"### ❌ Accuracy gate: {ABOVE}"),
        ("inconclusive", "measured", f"### ❌ Accuracy gate: {ABOVE}"),
    ],
)
def test_a_summary_has_verdict_reason_table_warnings_and_command(
    comparison: Verdict, on_inconclusive: OnInconclusive, heading: str
) -> None:
    made = decision(comparison, on_inconclusive=on_inconclusive, warnings=("another processor",))
    text = markdown(made, "m.onnx", "qat gate record m.onnx -o b.json")
    lines = text.splitlines()
    assert lines[0] == heading
    assert lines[2].startswith("m.onnx: top-1 fell by 2.00 points")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(made.rows())
    assert {line.count("|") for line in table} == {4}
    assert "| top-1, this model | 98.00 % |  |" in table
    assert "- Warning: another processor" in lines
    assert lines[-3:] == ["```", "qat gate record m.onnx -o b.json", "```"]


def test_names_and_messages_are_no_markup() -> None:
    text = markdown(decision("pass", warnings=("<b> | x\n# y",)), "a_b|`c`.onnx", "record `x` ```y")
    assert "\na\\_b\\|\\`c\\`.onnx: " in text
    assert "\n- Warning: \\<b\\> \\| x \\# y\n" in text
    assert text.endswith("````\nrecord `x` ```y\n````\n")


def test_a_refusal_is_summarized_too() -> None:
    text = markdown_of_error("b.json: top1: is missing\nsecond", "m_1.onnx")
    assert (
        text == "### ❌ Accuracy gate: refused\n\nm\\_1.onnx:\n\n```\nb.json: top1: is missing\nsecond\n```\n"
    )


# The file of a summary


def test_a_summary_is_appended_where_a_file_is_named_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("before\n", encoding="utf-8")
    environment = {"GITHUB_STEP_SUMMARY": str(path)}
    assert append_summary("### ✅ one\n", environment) is None
    assert append_summary("two \ud800\n", environment) is None
    assert path.read_text(encoding="utf-8") == "before\n### ✅ one\n\ntwo ?\n\n"
    assert append_summary("x", {}) is None
    assert append_summary("x", {"GITHUB_STEP_SUMMARY": ""}) is None
    assert list(tmp_path.iterdir()) == [path]


def test_the_outputs_of_a_step_are_the_figures_of_the_json_object(tmp_path: Path) -> None:
    path = tmp_path / "outputs"
    environment = {"GITHUB_OUTPUT": str(path)}
    assert append_outputs(decision("improved"), environment) is None
    lines = ["verdict=improved", "passes=true", "change=-2.0", "change_at_least=-6.0", "change_at_most=0.5"]
    lines += ["pairs=2", "images=100"]
    assert path.read_text(encoding="utf-8").splitlines() == lines
    assert append_outputs(None, environment) is None
    assert path.read_text(encoding="utf-8").splitlines() == [*lines, "verdict=refused", "passes=false"]
    assert append_outputs(None, {}) is None
    assert "the file that GITHUB_OUTPUT names cannot be" in str(append_outputs(None, {"GITHUB_OUTPUT": "/"}))


@pytest.mark.parametrize("name", ["{tmp}", "{tmp}/no/such/folder.md", "a\0b", "x" * 300])
def test_a_summary_that_cannot_be_written_is_told_not_raised(tmp_path: Path, name: str) -> None:
    problem = append_summary("x", {"GITHUB_STEP_SUMMARY": name.format(tmp=tmp_path)})
    assert problem is not None
    assert "the file that GITHUB_STEP_SUMMARY names cannot be written: " in problem
