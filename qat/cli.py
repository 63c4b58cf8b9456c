"""The command line: arguments in, exit codes out. The work is done elsewhere."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from qat import __version__
from qat.errors import QatError
from qat.progress import ConsoleReporter

# GNU OpenMP threads spin while they wait, by default so long that a second process on the same cores makes
# training five to eight times slower. It reads these when torch is loaded, which commands do later.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class _Path(click.Path):
    """A path that is not empty: pathlib would take an empty one for the working directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("is empty; give a path", param, ctx)
        return super().convert(value, param, ctx)


class _Text(click.types.StringParamType):
    """A text that is not empty; ``wanted`` says what to write."""

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail(f"is empty; {self.wanted}", param, ctx)
        return super().convert(value, param, ctx)


_OVERRIDE = _Text("write section.key=value")
_RECIPE = _Text("give a recipe file or a name from `qat recipe list`")

F = TypeVar("F", bound=Callable[..., Any])

_EPILOG = (
    "Exit codes: 0 success; 1 the work ran, but its result is not good enough; 2 wrong input; "
    "3 an error of this program; 130 interrupted."
)

#: Exit code of a command that SIGINT ended: 128 + 2, as shells have it.
_INTERRUPTED = 130
#: Where a click context notes that --debug was given.
_DEBUG = "qat.debug"


class _Command(click.Command):
    """A command that takes --debug after its name, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(["--debug"], is_flag=True, hidden=True, expose_value=False, callback=_set_debug)
        )


class _Group(click.Group):
    """Turns the project's errors into messages and exit codes; --debug shows the traceback."""

    command_class = _Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            # A file or pipe in a narrow encoding must not end a long run over one × or ≥.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise  # click's own
        except (KeyboardInterrupt, Exception) as error:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            if isinstance(error, KeyboardInterrupt):
                code, message = _INTERRUPTED, "interrupted"
            elif isinstance(error, QatError):
                code, message = error.exit_code, str(error)
            else:
                code, message = _unforeseen(error)
        click.echo(f"error: {message}", err=True)
        sys.exit(code)


def _unforeseen(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error that is not this project's."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    # torch has an error class for a full GPU only; its allocator for the CPU raises plain RuntimeErrors.
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return 2, (
            "not enough memory: a smaller data.batch_size, data.eval_batch_size, data.image_size or network "
            f"needs less ({text.splitlines()[0]})"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 2, f"cannot write: {error.strerror}"
    if isinstance(error, OSError) and error.filename is not None:  # a name that no file can have, say
        return 2, f"{str(error.filename)[:200]}: {error.strerror}"
    return 3, f"internal error: {text} (see `qat --debug`)"


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True


@click.group("qat", cls=_Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qat")
@click.option(
    "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show the traceback of an error."
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Quantization-aware fine-tuning of binary BNext networks, exported as integer ONNX graphs."""
    if not ctx.meta.get(_DEBUG):
        warnings.simplefilter("ignore")


def _recipe_options(default: str | None) -> Callable[[F], F]:
    """--recipe and --set."""

    def decorate(function: F) -> F:
        function = click.option(
            "--set",
            "overrides",
            multiple=True,
            type=_OVERRIDE,
            metavar="KEY=VALUE",
            help="Override one key of the recipe, such as --set schedule.epochs=5. Repeatable.",
        )(function)
        return click.option(
            "--recipe",
            type=_RECIPE,
            default=default,
            show_default=default is not None,
            required=False,
            metavar="FILE|NAME",
            help="A recipe file, or the name of a packaged recipe (see `qat recipe list`).",
        )(function)

    return decorate


def _console() -> Console:
    return Console()


@main.command()
@_recipe_options("tiny_int8")
def finetune(recipe: str, overrides: tuple[str, ...]) -> None:
    """Fine-tune a pretrained binary network with fake quantization.

    Calibrates, fine-tunes and writes a run directory with checkpoints, metrics and a summary.
    """
    from qat.recipe import load_recipe
    from qat.train import finetune as run_finetune

    run = run_finetune(load_recipe(recipe, overrides), ConsoleReporter(_console()))
    click.echo(f"{run.path}: done. Export it with: qat export --onnx --run {run.path}")


@main.command()
@_recipe_options("tiny_digits_pretrain")
def pretrain(recipe: str, overrides: tuple[str, ...]) -> None:
    """Train a binary network from random weights.

    The weight temperature is annealed until every binary weight is exactly ±1.
    """
    from qat.recipe import load_recipe
    from qat.train import pretrain as run_pretrain

    run = run_pretrain(load_recipe(recipe, overrides), ConsoleReporter(_console()))
    click.echo(f"{run.best}: written")


@main.command()
@click.option(
    "--onnx",
    "onnx_path",
    is_flag=False,
    flag_value="",
    default=None,
    metavar="[PATH]",
    help="Write an ONNX model, to PATH or to model.onnx beside the checkpoint.",
)
@click.option("--run", "run_path", type=_Path(), help="Run directory [default: the newest].")
@click.option("--checkpoint", type=_Path(), help="A fine-tuned checkpoint instead of a run.")
@click.option("--runs", type=_Path(), default="runs", show_default=True, help="Where runs are.")
@click.option(
    "--image-size", type=click.IntRange(min=8), help="Side of the model's input [default: as trained]."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    type=_OVERRIDE,
    metavar="data.KEY=VALUE",
    help="Override where the verification finds its data, such as --set data.root=DIR. Repeatable.",
)
def export(
    onnx_path: str | None,
    run_path: Path | None,
    checkpoint: Path | None,
    runs: Path,
    image_size: int | None,
    overrides: tuple[str, ...],
) -> None:
    """Export a fine-tuned network to ONNX.

    The graph has binary convolutions and 8-bit integers, and runs in stock onnxruntime.

    The model is verified on the test set against the network it came from, and written if it matches.
    """
    if onnx_path is None:
        raise click.UsageError("say what to export: --onnx, or --onnx PATH")
    if onnx_path and Path(onnx_path).suffix.lower() != ".onnx":
        # Whatever else the name means, a checkpoint say, must not be overwritten by a model.
        raise click.UsageError(f"--onnx: {onnx_path!r} does not end in .onnx")
    if run_path is not None and checkpoint is not None:
        raise click.UsageError("--run and --checkpoint exclude each other")
    from qat.commands import export_onnx

    console = _console()
    path, network, comparison = export_onnx(
        Path(onnx_path) if onnx_path else None, run_path, checkpoint, runs, image_size, overrides
    )
    console.print(str(network), highlight=False)
    table = Table(title="Verification")
    for heading in ("", "value", "bound"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in comparison.rows():
        table.add_row(*row)
    console.print(table)
    comparison.require()
    click.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB, verified")


@main.command()
@click.argument("model", type=_Path())
@_recipe_options(None)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(model: Path, recipe: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Accuracy of a run, a checkpoint or an .onnx file.

    The data is the test split that the model's own recipe names, changed by --set data.KEY=VALUE, or that
    of --recipe.
    """
    from qat.commands import evaluate_model

    accuracy = evaluate_model(model, recipe, overrides, lambda text: click.echo(f"warning: {text}", err=True))
    if as_json:
        click.echo(accuracy.to_json())
    else:
        click.echo(f"top-1 {accuracy.top1:.2f}%  top-5 {accuracy.top5:.2f}%  of {accuracy.n} images")


@main.group()
def recipe() -> None:
    """List, show and copy recipes, or print their JSON schema."""


@recipe.command("list")
def recipe_list() -> None:
    """The packaged recipes, one per line."""
    from qat.recipe import load_recipe, recipe_names

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "task", "network", "data"):
        table.add_column(heading)
    for name in recipe_names():
        content = load_recipe(name).recipe
        table.add_row(name, content.task, f"BNext {content.model.size}", content.data.dataset)
    _console().print(table)


@recipe.command("show")
@click.argument("name", type=_RECIPE)
@click.option("--resolved", is_flag=True, help="With every default written out, without comments.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    type=_OVERRIDE,
    metavar="KEY=VALUE",
    help="Override one key; implies --resolved.",
)
def recipe_show(name: str, resolved: bool, overrides: tuple[str, ...]) -> None:
    """Print a recipe."""
    from qat.recipe import load_recipe, recipe_yaml

    loaded = load_recipe(name, overrides)
    if resolved or overrides:
        click.echo(recipe_yaml(loaded.recipe), nl=False)
    else:
        click.echo(loaded.path.read_text(encoding="utf-8"), nl=False)


@recipe.command("copy")
@click.argument("name", type=_RECIPE)
@click.argument("destination", type=_Path(), default=".")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def recipe_copy(name: str, destination: Path, force: bool) -> None:
    """Copy a packaged recipe to DESTINATION (a folder or a file) as a start for your own."""
    from qat.recipe import copy_recipe

    click.echo(copy_recipe(name, destination, force))


@recipe.command("schema")
def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from qat.recipe import recipe_schema as schema

    click.echo(json.dumps(schema(), indent=2))
