"""`qat runs`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qat.cli.group import main
from qat.cli.options import NonEmptyPath
from qat.cli.terminal import print_table


@main.command()
@click.argument("paths", type=NonEmptyPath(), nargs=-1, metavar="[RUN…]")
@click.option("--runs", type=NonEmptyPath(), default="runs", show_default=True, help="Where runs are.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def runs(paths: tuple[Path, ...], runs: Path, as_json: bool) -> None:
    """List the runs in a folder, or compare those that are named.

    Of two and more runs the keys of their recipes that differ are shown beside what came out.
    """
    from qat.commands.runs import HEADINGS, compare_runs, list_runs, to_dict

    found, differences = compare_runs(paths) if paths else (list_runs(runs), [])
    if as_json:
        click.echo(json.dumps(to_dict(found, differences), indent=2))
        return
    if not found:
        click.echo(f"{runs}: no runs yet")
        return
    print_table("Runs", HEADINGS, [one.row() for one in found])
    if len(paths) > 1:
        names = [Path(one.path).name for one in found]
        rows = [(one.key, *one.values) for one in differences] or [("nothing differs", *("" for _ in names))]
        print_table("Keys of their recipes that differ", ("key", *names), rows)
