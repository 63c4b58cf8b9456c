"""`qat gate` and `qat gate record`: whether a model got worse, for CI."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from qat.cli.group import Command, main
from qat.cli.options import RECIPE, F, NonEmptyPath, set_option
from qat.cli.terminal import print_table, spinner, warn
from qat.errors import OutputError

if TYPE_CHECKING:
    from qat.gate.decision import Decision
    from qat.gate.rules import OnInconclusive


class _Gate(Command, click.Group):
    """A command with a MODEL, unless its first argument is the name of a subcommand."""

    command_class = Command
    # click's groups stop parsing at the first argument and take what follows for a subcommand. MODEL is an
    # argument, and options may follow it.
    allow_interspersed_args = True
    allow_extra_args = False

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of this command, or of the subcommand that the first argument names."""
        if args and (command := self.commands.get(args[0])):
            return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a usage line for the command and one for its subcommand."""
        formatter.write_usage(ctx.command_path, "[OPTIONS] MODEL --baseline FILE")
        formatter.write_usage(ctx.command_path, "record [OPTIONS] MODEL -o FILE", prefix="       ")


def _checked(ctx: click.Context, option: click.Parameter, value: Any) -> Any:
    """The value of an option that is a rule of the gate."""
    from qat.gate.rules import Rules

    if value is None:
        return None
    try:
        Rules(**{str(option.name): value})
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, option) from error
    return value


def _junit_file(ctx: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
    # A file of another kind, such as a model or a baseline, must not be overwritten by mistake.
    if value is not None and value.suffix.lower() != ".xml":
        raise click.BadParameter(f"{str(value)!r} does not end in .xml", ctx, option)
    return value


def _data_options(function: F) -> F:
    """Add --recipe and --set, which choose the images and their preprocessing."""
    function = set_option(
        "Override a key of the data, such as --set data.root=DIR. Repeatable.", metavar="data.KEY=VALUE"
    )(function)
    return click.option(
        "--recipe",
        type=RECIPE,
        metavar="FILE|NAME",
        help="Use the data of this recipe instead of the model's own.",
    )(function)


_EPILOG: Final = (
    "Exit codes: 0 pass, improved, or inconclusive with a measured drop within what is allowed; 1 fail, or "
    "inconclusive with a larger one (--on-inconclusive changes both); 2 wrong input, or a baseline of other "
    "data, classes or preprocessing."
)


@main.group("gate", cls=_Gate, invoke_without_command=True, no_args_is_help=False, epilog=_EPILOG)
@click.argument("model", type=NonEmptyPath())
@click.option("--baseline", type=NonEmptyPath(), metavar="FILE", help="What `qat gate record` wrote.")
@click.option(
    "--max-drop",
    type=float,
    callback=_checked,
    metavar="POINTS",
    help="Largest drop of top-1 that is allowed, in percentage points.  [default: 1.0]",
)
@click.option(
    "--max-relative-drop",
    type=float,
    callback=_checked,
    metavar="PERCENT",
    help="The same in percent of the baseline's measured top-1, instead of --max-drop.",
)
@click.option(
    "--confidence",
    type=float,
    default=0.95,
    show_default=True,
    callback=_checked,
    metavar="SHARE",
    help="Confidence of each bound of the change, above 0.5 and below 1.",
)
@click.option(
    "--floor",
    type=float,
    callback=_checked,
    metavar="PERCENT",
    help="Fail if the measured top-1 is below this, whatever the baseline says.",
)
@click.option(
    "--on-inconclusive",
    type=click.Choice(["measured", "pass", "fail"]),
    default="measured",
    show_default=True,
    help="Where the images are too few to tell: fail if the measured drop is larger than allowed, or always "
    "pass or fail. With `pass`, a model that is no worse fails in at most 5 % of runs.",
)
@click.option(
    "--show-flips", is_flag=True, help="List the images that changed sides, and in which direction."
)
@_data_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--junit",
    "junit_path",
    type=NonEmptyPath(),
    callback=_junit_file,
    metavar="FILE",
    help="Also write JUnit XML to this .xml file, even if no comparison was possible.",
)
def gate(
    model: Path,
    baseline: Path | None,
    max_drop: float | None,
    max_relative_drop: float | None,
    confidence: float,
    floor: float | None,
    on_inconclusive: OnInconclusive,
    show_flips: bool,
    recipe: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    junit_path: Path | None,
) -> None:
    """Test whether MODEL got worse than a recorded baseline.

    MODEL is a run, a checkpoint or an .onnx file. Its answers are paired with the baseline's, image by image.
    With the confidence asked for, it fails if top-1 fell by more than --max-drop, and passes if it did not.
    Else chance can't be excluded: the verdict says so, and the measured drop decides. Below --floor it always
    fails; where no image changed sides, it passes.

    The images are the test split that the model's own recipe names, or the one that --recipe names; --set
    data.KEY=VALUE changes it. In a GitHub job, a summary is appended to the file that GITHUB_STEP_SUMMARY
    names.
    """
    if baseline is None:
        raise click.UsageError(
            "--baseline FILE is missing; `qat gate record MODEL -o FILE` writes one for a model that is good"
        )
    if max_drop is not None and max_relative_drop is not None:
        raise click.UsageError("--max-drop and --max-relative-drop exclude each other; give one")
    for name, taken in (("MODEL", model), ("--baseline", baseline)):
        if junit_path is not None and junit_path.resolve() == taken.resolve():
            raise click.UsageError(f"--junit would overwrite {name}, {taken}; name another file")
    from qat.commands.gate import judge_model
    from qat.gate.output import junit, junit_of_error, markdown, markdown_of_error
    from qat.gate.rules import Rules
    from qat.system.files import write_atomically

    rules = Rules(max_drop, confidence, floor, on_inconclusive, max_relative_drop)
    started = time.monotonic()
    try:
        with spinner("evaluating"):
            decision = judge_model(model, baseline, rules, recipe, overrides, show_flips)
    except Exception as error:
        message = str(error) or type(error).__name__
        _tell_github(markdown_of_error(message, str(model)), None)
        if junit_path is not None:
            try:
                write_atomically(junit_path, junit_of_error(message, time.monotonic() - started))
            except OutputError as second:
                warn(str(second))  # the error that stopped the gate is the one to raise
        raise
    seconds = time.monotonic() - started
    record = _record_command(model, baseline, recipe, overrides)
    # Files first: whatever becomes of the terminal, a closed pipe say, a CI job finds them.
    _tell_github(markdown(decision, str(model), record), decision)
    unwritten = None
    if junit_path is not None:
        try:
            write_atomically(junit_path, junit(decision, seconds))
        except OutputError as error:
            unwritten = error
    if as_json:
        click.echo(decision.to_json())
    else:
        print_table(f"{model} against {baseline}", ("", "value", "bound"), decision.rows())
        for line in decision.flips.lines() if decision.flips else ():
            click.echo(line)
    for text in decision.warnings:
        warn(text)
    if decision.verdict == "inconclusive" and decision.passes:
        doubt = "the drop may be real" if decision.exceeds else "a larger drop may have gone unseen"
        warn(f"{decision.headline}: it passes, as --on-inconclusive {on_inconclusive} says; {doubt}")
    if unwritten is not None:
        warn(str(unwritten))
    decision.require()
    if not as_json:
        if decision.verdict == "improved":
            click.echo(f"record it as the new baseline: {record}")
        click.echo(f"{model}: {decision.headline}: {decision.reason}")
    if unwritten is not None:
        raise unwritten


def _record_command(model: Path, baseline: Path, recipe: str | None, overrides: Sequence[str]) -> str:
    words = ["qat", "gate", "record", str(model), "-o", str(baseline)]
    if recipe is not None:
        words += ["--recipe", recipe]
    for override in overrides:
        words += ["--set", override]
    return shlex.join(words)


def _tell_github(summary: str, decision: Decision | None) -> None:
    from qat.gate.output import append_outputs, append_summary

    for problem in (append_summary(summary), append_outputs(decision)):
        if problem:
            warn(problem)


@gate.command("record", short_help="Write the baseline of MODEL to FILE.")
@click.argument("model", type=NonEmptyPath())
@click.option(
    "-o",
    "--output",
    type=NonEmptyPath(),
    required=True,
    metavar="FILE",
    help="File to create, or a baseline to replace.",
)
@_data_options
def record(model: Path, output: Path, recipe: str | None, overrides: tuple[str, ...]) -> None:
    """Record which images MODEL gets right, as the baseline that `qat gate` compares with.

    MODEL is a run, a checkpoint or an .onnx file. FILE is JSON, small enough to be kept in a repository.
    """
    from qat.commands.gate import record_baseline

    with spinner("evaluating"):
        recorded = record_baseline(model, output, recipe, overrides, warn)
    click.echo(
        f"{output}: top-1 {recorded.top1:.2f}%  top-5 {recorded.top5:.2f}%  of {recorded.images} images, "
        f"{output.stat().st_size / 1000:.1f} kB"
    )
