"""`qat finetune` and `qat pretrain`."""

from __future__ import annotations

import click
from rich.console import Console

from qat.cli.group import main
from qat.cli.options import recipe_options
from qat.progress import ConsoleReporter


@main.command()
@recipe_options("tiny_int8")
def finetune(recipe: str, overrides: tuple[str, ...]) -> None:
    """Fine-tune a pretrained binary network with fake quantization.

    Calibrates, fine-tunes and writes a run directory with checkpoints, metrics and a summary.
    """
    from qat.recipe import load_recipe
    from qat.train import finetune as run_finetune

    run = run_finetune(load_recipe(recipe, overrides), ConsoleReporter(Console()))
    click.echo(f"{run.path}: done. Export it with: qat export --onnx --run {run.path}")


@main.command()
@recipe_options("tiny_digits_pretrain")
def pretrain(recipe: str, overrides: tuple[str, ...]) -> None:
    """Train a binary network from random weights.

    The weight temperature is annealed until every binary weight is exactly ±1.
    """
    from qat.recipe import load_recipe
    from qat.train import pretrain as run_pretrain

    run = run_pretrain(load_recipe(recipe, overrides), ConsoleReporter(Console()))
    click.echo(f"{run.best}: written")
