"""Parameter types and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

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


def recipe_options(default: str | None) -> Callable[[F], F]:
    """Add --recipe, which gives the command ``recipe`` (``default`` where it is not given), and --set."""

    def decorate(function: F) -> F:
        function = set_option("Override one key of the recipe, such as --set schedule.epochs=5. Repeatable.")(
            function
        )
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
