"""Tables and the spinner of the command line, as a terminal of 80 columns shows them."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from qat.cli.terminal import print_table, spinner, warn
from tests.helpers.paths import ROOT

HEADINGS = ("", "elements", "equal, optimized", "largest difference")


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_headings_of_numbers_take_a_line_per_word_and_cells_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table("a title", HEADINGS, [("binary convolutions", "3,409,920", "99.9999 %", "0.00374175")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["a", "title"]
    assert lines[1:3] == [["equal,", "largest"], ["elements", "optimized", "difference"]]
    assert lines[4] == ["binary", "convolutions", "3,409,920", "99.9999", "%", "0.00374175"]
    assert len(lines) == 5


def test_only_the_first_column_is_folded_where_the_table_is_too_wide(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "folder/" * 12 + "model.onnx"
    numbers = ("1234567890" * 2, "99.9999", "0.00374175")
    print_table("", HEADINGS, [(name, *numbers)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rule = next(index for index, line in enumerate(lines) if set(line.strip()) == {"─"})
    words = [line.split() for line in lines[rule + 1 :]]
    words = [row for row in words if row]
    assert words[-1][1:] == list(numbers)
    assert "".join(row[0] for row in words) == name


def test_on_a_terminal_that_is_too_narrow_lines_are_longer_than_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    print_table("a title", HEADINGS, [("binary convolutions", "3,409,920", "99.9999 %", "0.00374175")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["binary", "convolutions", "3,409,920", "99.9999", "%", "0.00374175"] in lines


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("[bold]t[/]", ("target", "ms"), [("a [b] [red]c", "1"), ("[/]", "2")])
    warn("[red]x[/nothing] [1, 2]")
    output, errors = capsys.readouterr()
    assert "[bold]t[/]" in output
    assert "a [b] [red]c" in output
    assert "[/]" in output.splitlines()[-2]
    assert errors == "warning: [red]x[/nothing] [1, 2]\n"


def test_a_long_warning_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    warn("x" * 60 + " " + "y" * 60)
    assert capsys.readouterr().err == f"warning: {'x' * 60} {'y' * 60}\n"


@pytest.mark.parametrize("forced", ["", "1"])
def test_where_standard_error_is_no_terminal_nothing_spins(
    forced: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", forced)
    with spinner("working") as say:
        say("still working")
        warn("careful")
    assert capsys.readouterr() == ("", "warning: careful\n")


_PROGRAM = """
import time
from qat.cli.terminal import print_table, spinner, warn
with spinner("working [b]") as say:
    time.sleep(0.2)
    warn("careful")
    say("nearly done")
    time.sleep(0.2)
print_table("a title", ("name", "ms"), [("a", "1")])
"""


def test_on_a_terminal_the_spinner_is_on_standard_error_and_warnings_have_their_own_line() -> None:
    read, write = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        env=environment | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=write,
    )
    os.close(write)
    shown = io.BytesIO()
    while part := _read(read):
        shown.write(part)
    os.close(read)
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read().decode()
    assert process.wait(timeout=60) == 0
    assert "\x1b" not in output
    assert "working" not in output
    errors = shown.getvalue().decode()
    assert "working [b]" in errors
    assert "nearly done" in errors
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", errors))
    assert "warning: careful" in lines


def _read(file: int) -> bytes:
    try:
        return os.read(file, 65536)
    except OSError:  # how Linux tells that the other end is closed
        return b""
