"""`qat report`: a page on a run."""

from __future__ import annotations

from pathlib import Path

import click

from qat.cli.group import main
from qat.cli.options import FileToWrite, NonEmptyPath, set_option
from qat.cli.terminal import spinner


@main.command()
@click.argument("run", required=False, type=NonEmptyPath())
@click.option(
    "-o", "--output", type=FileToWrite(".html", ".htm"), help="File to write [default: RUN/report.html]."
)
@click.option("--runs", type=NonEmptyPath(), default="runs", show_default=True, help="Where runs are.")
@set_option(
    "Override where the test images are found, such as --set data.root=DIR. Repeatable.",
    metavar="data.KEY=VALUE",
)
def report(run: Path | None, output: Path | None, runs: Path, overrides: tuple[str, ...]) -> None:
    """Write a report on RUN: one HTML file that loads nothing from the internet.

    RUN is a run directory; without it, the newest fine-tuning run is taken. `qat finetune` writes the same
    report when it ends. The report includes latency if the exported model was measured first:

        qat bench RUN/model.onnx --json > RUN/bench.json
    """
    from qat.commands.report import write_report

    with spinner("measuring"):
        path = write_report(run, output, overrides, runs)
    click.echo(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
