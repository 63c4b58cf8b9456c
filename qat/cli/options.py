"""Parameter types and options that several commands share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class NonEmptyPath(click.Path):
    """A path that is not empty, since pathlib reads an empty path as the working directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value, unless it is empty."""
        if value == "":
            self.fail("is empty; give a path", param, ctx)
        return super().convert(value, param, ctx)


class FileToWrite(NonEmptyPath):
    """The path of a file with one of ``endings``, so that no model or recipe is overwritten by mistake."""

    def __init__(self, *endings: str) -> None:
        super().__init__()
        self.endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, if it ends as it should."""
        path = super().convert(value, param, ctx)
        if Path(path).suffix.lower() not in self.endings:
            self.fail(f"{str(path)!r} does not end in {self.endings[0]}", param, ctx)
        return path


class NonEmptyText(click.types.StringParamType):
    """A text that is not empty; ``wanted`` says what to write."""

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value, unless it is empty."""
        if value == "":
            self.fail(f"is empty; {self.wanted}", param, ctx)
        return super().convert(value, param, ctx)


#: A recipe file or the name of a packaged recipe.
RECIPE = NonEmptyText("give a recipe file or a name from `qat recipe list`")

_OVERRIDE = NonEmptyText("write section.key=value")


def set_option(help: str, metavar: str = "KEY=VALUE") -> Callable[[F], F]:
    """Add the repeatable option --set, which gives the command ``overrides``, a tuple of texts."""
    return click.option("--set", "overrides", multiple=True, type=_OVERRIDE, metavar=metavar, help=help)


def recipe_options(
    default: str | None, such_as: str = "data.root=DIR", metavar: str = "KEY=VALUE"
) -> Callable[[F], F]:
    """--recipe, the command's ``recipe`` (``default`` where it is not given), and --set.

    Args:
        default: the recipe where none is given.
        such_as: an example of an override that the command takes.
        metavar: what overrides look like.
    """

    def decorate(function: F) -> F:
        function = set_option(
            f"Override one key of the recipe, such as --set {such_as}. Repeatable.", metavar
        )(function)
        return click.option(
            "--recipe",
            type=RECIPE,
            default=default,
            show_default=default is not None,
            required=False,
            metavar="FILE|NAME",
            help="A recipe file, or the name of a packaged recipe (see `qat recipe list`).",
        )(function)

    return decorate


class Short(NamedTuple):
    """An option that is short for ``--set KEY=VALUE``."""

    option: str
    key: str
    metavar: str
    type: Any


#: Options that stand for keys which nearly everyone sets. A checkpoint's path may be one beside the recipe.
SHORT: Final = (
    Short("--data", "data.root", "DIR", NonEmptyText("give a folder")),
    Short("--checkpoint", "model.checkpoint", "FILE", NonEmptyText("give a file")),
    Short("--epochs", "schedule.epochs", "N", int),
    Short("--batch-size", "data.batch_size", "N", int),
    Short("--lr", "optimizer.lr", "RATE", float),
    Short("--image-size", "data.image_size", "PIXELS", int),
    Short("--device", "device", "DEVICE", NonEmptyText("give a device")),
    Short("--run-name", "output.name", "NAME", NonEmptyText("give a name")),
)


def run_options(default: str, *without: str) -> Callable[[F], F]:
    """What a command that makes a run takes: a recipe, --set, and the options that are short for it.

    The command gets ``recipe``, ``overrides`` with those of the short options, ``output`` (the folder of
    ``-o``, or ``None``) and ``chosen`` (whether a recipe was named).

    Args:
        default: the recipe where none is named.
        without: short options that the command doesn't have.
    """
    shorts = [short for short in SHORT if short.option not in without]

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(argument: str | None, option: str | None, overrides: tuple[str, ...], **others: Any) -> Any:
            if argument is not None and option is not None:
                raise click.UsageError(f"two recipes: {argument} and --recipe {option}; name one")
            given = {short: others.pop(_name(short)) for short in shorts}
            texts = tuple(_as_overrides(given, overrides))
            named = argument if argument is not None else option
            return function(
                recipe=named or default, overrides=(*texts, *overrides), chosen=named is not None, **others
            )

        decorated: Any = set_option(
            "Override one key of the recipe, such as --set schedule.ema=0.99. Repeatable."
        )(run)
        for short in reversed(shorts):
            decorated = click.option(
                short.option,
                _name(short),
                type=short.type,
                metavar=short.metavar,
                help=f"Short for --set {short.key}={short.metavar}.",
            )(decorated)
        decorated = click.option(
            "-o",
            "--output",
            type=NonEmptyPath(),
            metavar="DIR",
            help="The run's folder, which must not exist yet [default: a new one under output.dir].",
        )(decorated)
        decorated = click.option(
            "--recipe", "option", type=RECIPE, metavar="FILE|NAME", help="The same as the argument RECIPE."
        )(decorated)
        named: F = click.argument("argument", type=RECIPE, required=False, metavar="[RECIPE]")(decorated)
        return named

    return decorate


def _name(short: Short) -> str:
    return "short_" + short.option.removeprefix("--").replace("-", "_")


def _as_overrides(given: dict[Short, Any], overrides: Sequence[str]) -> Iterator[str]:
    keys = {override.partition("=")[0].strip() for override in overrides}
    for short, value in given.items():
        if value is None:
            continue
        if short.key in keys:
            raise click.UsageError(f"{short.option} and --set {short.key}=… say the same; give one of them")
        # A text stays one, whatever number it looks like.
        yield f"{short.key}={json.dumps(value, ensure_ascii=False)}"
