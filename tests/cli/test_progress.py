"""What a watcher of a training run sees, on a terminal and elsewhere."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from qat.cli.progress import ConsoleReporter

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def epoch(number: int, **changes: Any) -> dict[str, Any]:
    metrics = {
        "epoch": number,
        "loss": 0.5,
        "top1": 87.5,
        "test_loss": 0.25,
        "test_top1": 91.0,
        "images_per_second": 1234.4,
        "seconds": 12.6,
        "temperature": 1e-8,
    }
    return metrics | changes


def run(console: Console, epochs: int = 2, steps: int = 3) -> None:
    reporter = ConsoleReporter(console)
    reporter.message("calibrated [bold]4 points[/bold]")
    reporter.start(epochs, steps)
    for number in range(1, epochs + 1):
        for _ in range(steps):
            reporter.step(number, {"loss": 0.75, "top1": 62.5, "images_per_second": 432.1})
        if reporter.progress is not None:
            reporter.progress.refresh()
        reporter.epoch(epoch(number))
    reporter.stop()


def plain(width: int = 60) -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, width=width), text


def terminal(width: int = 160) -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, width=width, force_terminal=True, legacy_windows=False, _environ={}), text


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_elsewhere_there_is_one_line_per_epoch_and_no_control_code() -> None:
    console, text = plain()
    run(console, epochs=3)
    lines = text.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert not CONTROL.search(text.getvalue())


def test_an_epochs_line_has_its_figures_and_is_not_wrapped() -> None:
    console, text = plain(width=30)
    run(console, epochs=1)
    line = text.getvalue().splitlines()[-1]
    assert line == (
        "epoch 1/1  loss 0.5000  top-1 87.50%  test loss 0.2500  test top-1 91.00%  1234 images/s  13 s"
    )


def test_the_temperature_shows_only_while_it_means_something() -> None:
    for value, shown in ((0.1, True), (1e-7, True), (9e-8, False), (1e-8, False)):
        console, text = plain()
        ConsoleReporter(console).epoch(epoch(1, temperature=value))
        assert ("temperature" in text.getvalue()) is shown


def test_brackets_in_a_message_are_text_not_markup() -> None:
    console, text = plain()
    ConsoleReporter(console).message("BNext custom [8, 8, 16] in [red]runs[/red]")
    ConsoleReporter(console).warning("data.mean is [0.5, 0.5]")
    assert text.getvalue() == (
        "BNext custom [8, 8, 16] in [red]runs[/red]\nwarning: data.mean is [0.5, 0.5]\n"
    )


def test_on_a_terminal_a_bar_shows_loss_accuracy_throughput_and_time_left() -> None:
    console, text = terminal()
    run(console)
    seen = text.getvalue()
    assert "\x1b[" in seen
    bare = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    for part in ("epoch 1/2", "━", "6/6", "loss 0.7500", "top-1 62.50%", "432 images/s", "left"):
        assert part in bare, part
    assert re.search(r"left (-:--:--|\d:\d\d:\d\d)", bare)


def test_the_cursor_is_back_when_a_terminal_run_stops() -> None:
    console, text = terminal()
    run(console)
    assert text.getvalue().rindex("\x1b[?25h") > text.getvalue().rindex("\x1b[?25l")


def test_the_epochs_lines_stay_on_a_terminal_too() -> None:
    console, text = terminal()
    run(console)
    bare = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    assert "epoch 2/2  loss 0.5000  top-1 87.50%" in bare


def test_no_epochs_means_no_bar() -> None:
    console, text = terminal()
    reporter = ConsoleReporter(console)
    reporter.start(0, 5)
    reporter.stop()
    assert text.getvalue() == ""


def test_stop_may_come_twice_and_without_a_start() -> None:
    console, _ = terminal()
    reporter = ConsoleReporter(console)
    reporter.stop()
    reporter.start(1, 1)
    reporter.stop()
    reporter.stop()
    reporter.step(1, {"loss": 0.0, "top1": 0.0, "images_per_second": 0.0})  # a late step moves nothing


def test_the_bar_of_a_resumed_run_begins_where_the_run_goes_on() -> None:
    reporter = ConsoleReporter(terminal()[0])
    reporter.start(2, 10, 13)
    try:
        assert reporter.progress is not None
        assert [(task.completed, task.total) for task in reporter.progress.tasks] == [(13, 20)]
    finally:
        reporter.stop()
