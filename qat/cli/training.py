"""`qat finetune` and `qat pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qat.cli.group import main
from qat.cli.options import NonEmptyPath, run_options
from qat.cli.progress import ConsoleReporter
from qat.cli.terminal import StandardOutput, spinner, warn
from qat.errors import QatError, first_line
from qat.system.launch import launched

if TYPE_CHECKING:
    from qat.recipe.loading import LoadedRecipe
    from qat.train.resume import Resumed


_resume_option = click.option(
    "--resume",
    type=NonEmptyPath(),
    metavar="RUN",
    help="Continue a run that was stopped, from its newest saved state and with its own recipe. On a CPU "
    "with the same number of threads, the result is the same, byte for byte, as without the stop. --set may "
    "change device, threads, parallel, data.workers, data.on_error, tracking and how often states are "
    "saved.",
)


def _opened(
    recipe: str,
    overrides: tuple[str, ...],
    chosen: bool,
    output: Path | None,
    resume: Path | None,
    reporter: ConsoleReporter,
) -> tuple[LoadedRecipe, Resumed | None]:
    """The recipe to run and, with --resume, the run that goes on; a finished one ends the command."""
    from qat.recipe.loading import load_recipe

    if resume is None:
        return load_recipe(recipe, overrides), None
    from qat.train.resume import is_finished, open_run
    from qat.train.state_file import remove_states

    context = click.get_current_context()
    if chosen:
        raise click.UsageError("--resume goes on with the run's own recipe; leave out --recipe, or RECIPE")
    if output is not None:
        raise click.UsageError("--resume goes on in the run's own folder; leave out --output")
    if is_finished(resume):
        if launched().rank == 0:
            remove_states(resume)  # a run that was killed just after its last file still has them
            click.echo(
                f"{resume}: this run has finished; nothing is left to do. To train on, begin a new run from "
                f"its result: qat {context.info_name} {resume}/recipe.yaml --checkpoint "
                f"{resume}/best.safetensors --epochs N"
            )
        context.exit(0)
    resumed = open_run(resume, overrides, reporter)
    return resumed.loaded, resumed


@main.command()
@run_options("tiny_int8")
@_resume_option
def finetune(
    recipe: str, overrides: tuple[str, ...], chosen: bool, output: Path | None, resume: Path | None
) -> None:
    """Fine-tune a pretrained binary network with fake quantization.

    RECIPE is a recipe file or the name of a packaged recipe (see `qat recipe list`), tiny_int8 by default.
    Calibrates, fine-tunes and writes a run directory with checkpoints, metrics, a summary and a report.
    SIGTERM saves the training's state and exits with 143.
    """
    _finetune(recipe, overrides, chosen, output, resume)


@main.command()
@run_options("tiny_int8", "--epochs", "--lr")
def quantize(recipe: str, overrides: tuple[str, ...], chosen: bool, output: Path | None) -> None:
    """Quantize a trained binary network without training it (post-training quantization).

    RECIPE is a recipe for fine-tuning, tiny_int8 by default: its network, its images and its bits are used.
    Ranges are found from some batches of training images, weights stay as they are, and the run directory is
    as after `qat finetune`. This takes minutes. With fewer than 8 bits fine-tuning keeps much more accuracy.
    """
    fixed = {"schedule.epochs": "0", "schedule.float_epochs": "0", "model.classifier": "keep"}
    for override in overrides:
        if (key := override.partition("=")[0].strip()) in fixed:
            raise click.UsageError(f"--set {key}=…: nothing is trained here; use qat finetune")
    texts = [f"{key}={value}" for key, value in fixed.items()]
    _finetune(recipe, (*overrides, *texts), chosen, output, None)


def _finetune(
    recipe: str, overrides: tuple[str, ...], chosen: bool, output: Path | None, resume: Path | None
) -> None:
    from qat.system.collectives import joined
    from qat.train.finetuning import finetune as run_finetune

    with joined() as world:
        reporter = ConsoleReporter(StandardOutput(quiet=world.rank > 0))
        loaded, resumed = _opened(recipe, overrides, chosen, output, resume, reporter)
        run = run_finetune(loaded, reporter, resumed, folder=output)
    if world.rank:
        return
    report_on(run.path)
    click.echo(f"{run.path}: done. Export it with: qat export --onnx --run {run.path}")


def report_on(run: Path) -> None:
    """Write the report on a finished run. An error here becomes a warning: the run itself succeeded."""
    try:
        with spinner("writing the report"):
            from qat.commands.report import write_report

            path = write_report(run)
    except QatError as error:
        warn(f"no report: {error}")
    except Exception as error:  # such as too little memory: the training before it did not fail
        warn(f"no report: {type(error).__name__}: {first_line(error)} (see `qat --debug report {run}`)")
    else:
        click.echo(f"{path}: written")


@main.command()
@run_options("tiny_digits_pretrain")
@_resume_option
def pretrain(
    recipe: str, overrides: tuple[str, ...], chosen: bool, output: Path | None, resume: Path | None
) -> None:
    """Train a binary network from random weights.

    RECIPE is a recipe file or the name of a packaged recipe (see `qat recipe list`), tiny_digits_pretrain by
    default.

    The weight temperature is annealed until every binary weight is exactly ±1. SIGTERM saves the training's
    state and exits with 143.
    """
    from qat.system.collectives import joined
    from qat.train.pretraining import pretrain as run_pretrain

    with joined() as world:
        reporter = ConsoleReporter(StandardOutput(quiet=world.rank > 0))
        loaded, resumed = _opened(recipe, overrides, chosen, output, resume, reporter)
        run = run_pretrain(loaded, reporter, resumed, folder=output)
    if world.rank:
        return
    click.echo(f"{run.best}: written")
