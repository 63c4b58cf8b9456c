"""`qat sensitivity`: what quantization costs, part by part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from qat.cli.group import main
from qat.cli.options import FileToWrite, recipe_options
from qat.cli.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from qat.quantize.overrides import GroupName
    from qat.sensitivity.findings import Findings


class _Bits(click.types.StringParamType):
    """Numbers of bits from 2 to 8, separated by commas."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The numbers of bits, as a tuple."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        if bad := [word for word in words if word not in {"2", "3", "4", "5", "6", "7", "8"}]:
            self.fail(f"{bad[0]!r} is no width; write whole numbers of 2 to 8, such as 8,6,4", param, ctx)
        return tuple(int(word) for word in words)


class _Amount(click.types.FloatParamType):
    """A finite number that is not negative."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not (math.isfinite(number) and number >= 0):
            self.fail(f"{value} is not a number of at least 0", param, ctx)
        return number


@main.command()
@recipe_options("tiny_int8", "quantization.se.weight_bits=4")
@click.option(
    "--by",
    type=click.Choice(["group", "layer", "both"]),
    default="both",
    show_default=True,
    help="Measure groups, layers, or both.",
)
@click.option(
    "--group",
    "groups",
    multiple=True,
    type=click.Choice(["stem", "se", "classifier", "trunk"]),
    help="Only this group and its layers. Repeatable [default: all that the recipe quantizes].",
)
@click.option(
    "--bits",
    type=_Bits(),
    default="8,6,5,4,3,2",
    show_default=True,
    help="Numbers of bits to try, separated by commas.",
)
@click.option(
    "--images",
    type=int,
    help="Number of test images to measure on, evenly spaced [default: at most 512, for layers at most 160].",
)
@click.option(
    "--tolerance",
    type=_Amount(),
    default=0.5,
    show_default=True,
    help="Percentage points of top-1 that the suggestion may lose against the recipe.",
)
@click.option(
    "--noise-budget",
    type=_Amount(),
    default=3.0,
    show_default=True,
    help="Decibels of SQNR that the suggestion may lose against the recipe.",
)
@click.option(
    "-o",
    "--output",
    type=FileToWrite(".html", ".htm"),
    metavar="FILE.html",
    help="Also write a page with charts.",
)
@click.option(
    "--recipe-out",
    type=FileToWrite(".yaml", ".yml"),
    metavar="FILE.yaml",
    help="Also write the recipe, with the suggested quantization section, to a new file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with everything.")
def sensitivity(
    recipe: str,
    overrides: tuple[str, ...],
    by: Literal["group", "layer", "both"],
    groups: tuple[GroupName, ...],
    bits: tuple[int, ...],
    images: int | None,
    tolerance: float,
    noise_budget: float,
    output: Path | None,
    recipe_out: Path | None,
    as_json: bool,
) -> None:
    """Find out which parts of a network quantization hurts, and suggest mixed bits.

    Without fine-tuning, each group and each layer is quantized alone, then left in float alone, and each
    number of bits is lowered alone. Each of these networks is compared with the float-rest network by top-1
    and by the noise in its logits (SQNR, the signal-to-quantization-noise ratio in dB). The suggested
    quantization section loses at most --tolerance and --noise-budget against the recipe's own. It is chosen
    on test images, so judge it on others, after fine-tuning.
    """
    from rich.console import Console

    from qat.cli.progress import ConsoleReporter
    from qat.commands.sensitivity import measure_recipe, require_new, write_recipe
    from qat.recipe.loading import load_recipe
    from qat.sensitivity.bitwidths import Limits
    from qat.sensitivity.findings import Questions
    from qat.system.files import require_writable, write_atomically

    loaded = load_recipe(recipe, overrides)
    # Refuse outputs that can't be written before measuring, which takes minutes.
    if recipe_out is not None:
        require_new(recipe_out)
    for path in (output, recipe_out):
        if path is not None:
            require_writable(path)
    questions = Questions(by, groups, bits, images, Limits(tolerance, noise_budget))
    console = Console(stderr=True)
    with _progress(console) as watch:
        findings = measure_recipe(loaded, questions, ConsoleReporter(console), watch)
    if as_json:
        click.echo(findings.to_json())
    else:
        _print(findings)
    written = []
    if output is not None:
        from qat.commands.sensitivity_page import page

        write_atomically(output, page(findings))
        written.append(output)
    if recipe_out is not None:
        write_recipe(findings, recipe_out)
        written.append(recipe_out)
    for path in written:
        click.echo(f"{path}: {path.stat().st_size / 1e3:.0f} kB", err=as_json)


def _print(findings: Findings) -> None:
    from qat.commands.sensitivity_page import MOST_SENSITIVE, network_table, sensitivity_table, width_table

    tables = [network_table(findings)]
    if findings.groups:
        tables.append(sensitivity_table(findings.groups, "Groups"))
    if layers := findings.layers:
        caption = f"Most sensitive of {len(layers)} layers"
        tables.append(sensitivity_table(layers, caption, MOST_SENSITIVE))
    if findings.widths:
        tables.append(width_table(findings))
    for table in tables:
        print_table(table.caption, table.headings, table.rows)
    for note in findings.notes():
        click.echo(note)
    click.echo(f"\n{findings.verdict()}\n\n{findings.section()}", nl=False)


class _Watch:
    """Counts variants on a bar."""

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.total = 0
        self.task = self.bar.add_task("measuring", total=None)

    def expect(self, steps: int) -> None:
        """Announce that ``steps`` more variants will be measured."""
        self.total += steps
        self.bar.update(self.task, total=self.total)

    def done(self, what: str) -> None:
        """Count one measured variant, described by ``what``."""
        self.bar.update(self.task, advance=1, description=what)


@contextmanager
def _progress(console: Console) -> Iterator[_Watch]:
    watch = _Watch(console)
    with watch.bar:
        yield watch
