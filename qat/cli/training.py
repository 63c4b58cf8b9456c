"""`qat finetune` and `qat pretrain`."""

from __future__ import annotations

from pathlib import Path

import click

from qat.cli.group import main
from qat.cli.options import recipe_options
from qat.cli.terminal import StandardOutput, spinner, warn
from qat.errors import QatError, first_line
from qat.progress import ConsoleReporter


@main.command()
@recipe_options("tiny_int8")
def finetune(recipe: str, overrides: tuple[str, ...]) -> None:
    """Fine-tune a pretrained binary network with fake quantization.

    Calibrates, fine-tunes and writes a run directory with checkpoints, metrics, a summary and a report.
    """
    from qat.recipe import load_recipe
    from qat.train import finetune as run_finetune

    run = run_finetune(load_recipe(recipe, overrides), ConsoleReporter(StandardOutput()))
    _report(run.path)
    click.echo(f"{run.path}: done. Export it with: qat export --onnx --run {run.path}")


def _report(run: Path) -> None:
    """Write the report on a finished run, which stays a success whatever goes wrong here."""
    try:
        with spinner("writing the report"):
            from qat.commands.report import write_report

            path = write_report(run)
    except QatError as error:
        warn(f"no report: {error}")
    except Exception as error:  # too little memory, say: hours of training must not end in an exit code
        warn(f"no report: {type(error).__name__}: {first_line(error)} (see `qat --debug report {run}`)")
    else:
        click.echo(f"{path}: written")


@main.command()
@recipe_options("tiny_digits_pretrain")
def pretrain(recipe: str, overrides: tuple[str, ...]) -> None:
    """Train a binary network from random weights.

    The weight temperature is annealed until every binary weight is exactly ±1.
    """
    from qat.recipe import load_recipe
    from qat.train import pretrain as run_pretrain

    run = run_pretrain(load_recipe(recipe, overrides), ConsoleReporter(StandardOutput()))
    click.echo(f"{run.best}: written")
