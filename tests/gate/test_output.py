"""JUnit XML and Markdown of the accuracy gate: every verdict, and text that would break either."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, Literal

import pytest

from qat.gate.decision import Decision, Rules, Verdict
from qat.gate.output import append_summary, junit, junit_of_error, markdown, markdown_of_error
from qat.gate.paired_statistics import Pairs
from tests.helpers.recorded_baselines import baseline

#: Control characters, half of a surrogate pair, markup, and a line end.
HOSTILE = "a\x00b\x1b[31m \ud800 </failure>]]>&\"'|`_*\nnext \ufffe 😀"


def decision(
    comparison: Verdict,
    *,
    floor: float | None = None,
    floor_broken: bool = False,
    on_inconclusive: Literal["pass", "fail"] = "pass",
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
    ],
)
def test_each_verdict_has_its_outcome(
    comparison: Verdict, on_inconclusive: Literal["pass", "fail"], tag: str
) -> None:
    made = decision(comparison, on_inconclusive=on_inconclusive)
    suite, (case,) = parsed(junit(made, 1.25))
    assert outcome(case) == tag
    assert suite.get("time") == case.get("time") == "1.250"
    if tag:
        assert case.find(tag).get("message") == f"{comparison}: {made.reason}"  # type: ignore[union-attr]


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
        ("inconclusive", "pass", "### ⚠️ Accuracy gate: inconclusive"),
        ("inconclusive", "fail", "### ❌ Accuracy gate: inconclusive"),
    ],
)
def test_a_summary_has_verdict_reason_table_warnings_and_command(
    comparison: Verdict, on_inconclusive: Literal["pass", "fail"], heading: str
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


@pytest.mark.parametrize("name", ["{tmp}", "{tmp}/no/such/folder.md", "a\0b", "x" * 300])
def test_a_summary_that_cannot_be_written_is_told_not_raised(tmp_path: Path, name: str) -> None:
    problem = append_summary("x", {"GITHUB_STEP_SUMMARY": name.format(tmp=tmp_path)})
    assert problem is not None
    assert "the file that GITHUB_STEP_SUMMARY names cannot be written: " in problem
