"""Output of the accuracy gate for CI: JUnit XML, and Markdown for the summary of a GitHub job."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from qat.gate.decision import Decision

#: The environment variable that names the file of a GitHub job's summary.
SUMMARY: Final = "GITHUB_STEP_SUMMARY"
#: The one that names the file of a step's outputs, and what is put there.
STEP_OUTPUTS: Final = "GITHUB_OUTPUT"
OUTPUTS: Final = ("verdict", "passes", "change", "change_at_least", "change_at_most", "pairs", "images")
_SUITE: Final = "qat gate"
_COMPARISON: Final = "top-1 against the baseline"
_FLOOR: Final = "top-1 against the floor"
#: Characters that XML 1.0 can't hold, not even as a character reference.
_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
#: Characters that have a meaning in Markdown text or tables, or in HTML.
_MARKUP: Final = re.compile(r"([\\`*_{}\[\]<>|~$#&!])")


def junit(decision: Decision, seconds: float) -> str:
    """JUnit XML of a decision: a test case for the comparison, and one for the floor if there is one.

    An inconclusive comparison that passes is a skipped test, so that it shows. The output of the first case
    has the table, and the images that changed sides where they were asked for.

    Args:
        decision: the decision.
        seconds: how long it took, in seconds.
    """
    comparison = _case(_COMPARISON, seconds)
    reason = f"{decision.comparison_headline}: {decision.comparison_reason}"
    if not decision.comparison_passes:
        _outcome(comparison, "failure", reason, decision.comparison)
    elif decision.comparison == "inconclusive":
        _outcome(comparison, "skipped", reason)
    cases = [comparison]
    if decision.rules.floor is not None:
        floor = _case(_FLOOR, 0.0)
        if decision.floor_broken:
            _outcome(floor, "failure", f"fail: {decision.floor_reason}", "fail")
        cases.append(floor)
    lines = [f"{decision.headline}: {decision.reason}", *(f"warning: {text}" for text in decision.warnings)]
    lines += [f"{what}: {value}{bound and f' ({bound})'}" for what, value, bound in decision.rows()]
    lines += decision.flips.lines() if decision.flips else []
    ET.SubElement(comparison, "system-out").text = _xml("\n".join(lines))
    return _suite(cases, seconds)


def junit_of_error(message: str, seconds: float) -> str:
    """JUnit XML of a gate that could not decide: one test case with an error."""
    case = _case(_COMPARISON, seconds)
    _outcome(case, "error", message, "refused")
    return _suite([case], seconds)


def _case(name: str, seconds: float) -> ET.Element:
    return ET.Element("testcase", classname=_SUITE, name=name, time=f"{seconds:.3f}")


def _outcome(case: ET.Element, tag: str, message: str, kind: str | None = None) -> None:
    outcome = ET.SubElement(case, tag, message=_xml(message))
    if kind is not None:
        outcome.set("type", kind)
        outcome.text = _xml(message)


def _suite(cases: list[ET.Element], seconds: float) -> str:
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": sum(case.find("error") is not None for case in cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    attributes = {"name": _SUITE} | {key: str(count) for key, count in counts.items()}
    attributes["time"] = f"{seconds:.3f}"
    root = ET.Element("testsuites", attributes)
    suite = ET.SubElement(root, "testsuite", attributes)
    suite.set("timestamp", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"))
    suite.extend(cases)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)


def markdown(decision: Decision, model: str, record: str) -> str:
    """Markdown of a decision: verdict, table, warnings, and the command that records a new baseline.

    Args:
        decision: the decision.
        model: the model's path, as the user gave it.
        record: the command that records a new baseline.
    """
    sign = "✅" if decision.passes else "❌"
    if decision.verdict == "inconclusive" and decision.passes:
        sign = "⚠️"
    lines = [
        f"### {sign} Accuracy gate: {decision.headline}",
        "",
        f"{_markup(model)}: {_markup(decision.reason)}.",
        "",
        "| | value | bound |",
        "|:--|--:|--:|",
        *(f"| {' | '.join(map(_markup, row))} |" for row in decision.rows()),
        "",
        *(f"- Warning: {_markup(text)}" for text in decision.warnings),
        *([""] if decision.warnings else []),
        *([*_code("\n".join(decision.flips.lines())), ""] if decision.flips else []),
        "If this accuracy is the wanted one, record it as the new baseline:",
        "",
        *_code(record),
    ]
    return "\n".join(lines) + "\n"


def markdown_of_error(message: str, model: str) -> str:
    """Markdown of a gate that could not decide."""
    return f"### ❌ Accuracy gate: refused\n\n{_markup(model)}:\n\n" + "\n".join(_code(message)) + "\n"


def _markup(text: str) -> str:
    """``text`` on one line, with everything escaped that Markdown or HTML would read as markup."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def _code(text: str) -> list[str]:
    """The lines of a code block, with a fence longer than any run of backquotes in ``text``."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, text, fence]


def append_summary(text: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Append ``text`` to the file that ``GITHUB_STEP_SUMMARY`` names, if that is set.

    Returns:
        A sentence on why the file could not be written, for a warning, or ``None``. It is no error, since a
        missing summary must not fail the job.
    """
    return _append(SUMMARY, f"{text}\n", environment)


def append_outputs(decision: Decision | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Append the outputs of a step to the file that ``GITHUB_OUTPUT`` names, if it names one.

    Later steps of the job read them as ``steps.ID.outputs.NAME``; names and values are those of the JSON
    object. Of a gate that could not decide, ``None``, the verdict is ``refused``.

    Returns:
        As :func:`append_summary`.
    """
    content = {"verdict": "refused", "passes": False} if decision is None else decision.to_dict()
    values = {name: content[name] for name in OUTPUTS if name in content}
    text = "".join(f"{name}={_value(value)}\n" for name, value in values.items())
    return _append(STEP_OUTPUTS, text, environment)


def _value(value: object) -> str:
    """A value as a workflow's expressions write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _append(variable: str, text: str, environment: Mapping[str, str]) -> str | None:
    """Append to the file that an environment variable names; why that failed."""
    name = environment.get(variable)
    if not name:
        return None
    try:
        with Path(name).open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"{name}: the file that {variable} names cannot be written: {reason}"
    return None
