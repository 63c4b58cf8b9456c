"""What commands show: tables on standard output, warnings and a spinner on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text


class StandardOutput(Console):
    """A console that raises BrokenPipeError on a closed pipe, as click's own output does."""

    def on_broken_pipe(self) -> None:
        """Raise the error again; rich would end the process with exit code 1."""
        raise


#: Characters that the first column of a table gets at least, if its texts are that long.
_LEAST_NAME: Final = 24
#: One console for warnings and spinner, so that a warning is not written into the spinner's line.
_ERRORS: Final = Console(stderr=True)


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are numbers.

    Where the table doesn't fit the terminal, the texts of the first column are wrapped. The headings of
    numbers, often longer than the numbers, take a line per word.
    """
    # As Text, so that brackets in file names are not read as rich's markup.
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE, collapse_padding=True)
    for index, heading in enumerate(headings):
        if index == 0:
            table.add_column(Text(heading), overflow="fold")
        else:
            table.add_column(
                Text(heading.replace(" ", "\n")), justify="right", vertical="bottom", no_wrap=True
            )
    for row in rows:
        table.add_row(*map(Text, row))
    console = StandardOutput()
    console.width = max(console.width, _least_width(headings, rows))
    console.print(table)


def _least_width(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Width, in characters, of all numbers and the beginning of the first column.

    On a terminal narrower than that, long lines are easier to read than names wrapped to a letter per line.
    """
    columns = [[*heading.split(), *cells] for heading, *cells in zip(headings, *rows, strict=True)]
    first, *numbers = (max(map(cell_len, cells), default=0) for cells in columns)
    return min(first, _LEAST_NAME) + sum(numbers) + 2 * (len(columns) + 1)


def warn(text: str) -> None:
    """Print a warning on standard error."""
    _ERRORS.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def spinner(text: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner with ``text`` while the block runs, if standard error is a terminal.

    Yields a function that replaces the text.
    """
    if not (sys.stderr.isatty() and _ERRORS.is_interactive):
        yield lambda _: None
        return
    # Four redraws a second are too few to slow down what `qat bench` measures meanwhile.
    with _ERRORS.status(Text(text), refresh_per_second=4) as status:
        yield lambda news: status.update(Text(news))
