"""`qat data`: what is said about a data set before anything is trained on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from qat.cli.group import main
from qat.cli.options import NonEmptyPath, recipe_options
from qat.cli.terminal import print_table

if TYPE_CHECKING:
    from qat.commands.data import CheckedData

#: Problems that are listed without --json.
_LISTED: Final = 20
_PURPOSES: Final = {"train": "to train on", "test": "to choose epochs on", "final": "for the last figure"}


@main.group()
def data() -> None:
    """Check a data set."""


@data.command("check")
@click.option(
    "--data", "folder", type=NonEmptyPath(), metavar="DIR", help="A folder of images or Parquet files."
)
@recipe_options(None)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every problem.")
def data_check(folder: Path | None, recipe: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Decode every image of a data set, and name those that cannot be used.

    The data set is that of --recipe, or lies in the folder --data. Exit code 1 where there are such images;
    `qat finetune` leaves them out with --set data.on_error=skip.
    """
    if (folder is None) == (recipe is None):
        raise click.UsageError("say which data set: --data DIR, or --recipe FILE|NAME")
    if folder is not None and overrides:
        raise click.UsageError("--set changes a recipe; give one with --recipe")
    from qat.commands.data import check_data, data_in
    from qat.recipe.loading import load_recipe

    if folder is not None:
        chosen = data_in(folder)
    else:
        assert recipe is not None
        chosen = load_recipe(recipe, overrides).recipe.data
    with _bar() as watch:
        found = check_data(chosen, watch)
    if as_json:
        click.echo(found.to_json())
    else:
        _print(found)
    if found.problems:
        sys.exit(1)


def _print(found: CheckedData) -> None:
    from qat.data.problems import counts, shown

    rows = [
        (
            f"{shown(one.name)} ({_PURPOSES[one.purpose]})",
            f"{one.images:,}",
            f"{one.classes:,}",
            f"{one.smallest:,}–{one.largest:,}",
            f"{one.passed_over:,}",
        )
        for one in found.splits
    ]
    print_table("Splits", ("", "images", "classes", "per class", "other files"), rows)
    for note in found.notes:
        click.echo(note)
    for problem in found.problems[:_LISTED]:
        click.echo(f"{shown(problem.name)}: {problem.kind}: {shown(problem.reason)}")
    if len(found.problems) > _LISTED:
        click.echo(f"… and {len(found.problems) - _LISTED:,} more, which --json lists")
    if not found.problems:
        click.echo("every image can be decoded")
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts(found.problems).items())
    click.echo(
        f"{len(found.problems):,} cannot be used: {kinds}; repair or remove them, or leave them out with "
        "--set data.on_error=skip"
    )


class _Watch:
    """Counts images on a bar, where standard error is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("listing", total=None)

    def expect(self, steps: int) -> None:
        """So many images are going to be decoded."""
        self.bar.update(self.task, total=steps)

    def done(self, what: str) -> None:
        """One image of the split ``what`` was."""
        self.bar.update(self.task, advance=1, description=f"decoding {what}")


@contextmanager
def _bar() -> Iterator[_Watch]:
    watch = _Watch()
    with watch.bar:
        yield watch
