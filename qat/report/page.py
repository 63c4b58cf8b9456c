"""HTML pages of one file each, without scripts or links, for screens of all sizes, dark mode and print.

``templates/base.html`` has the frame and the colours, and a page's template extends it. The macros
``section``, ``tiles``, ``figure``, ``grid``, ``table`` and ``fold`` are in ``templates/parts.html``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from qat import __version__

#: Text in place of a missing number.
ABSENT: Final = "–"
#: Largest number from a file that is shown: no measurement is as large, and axes lack room for more digits.
_LARGEST: Final = 1e15


@dataclass(frozen=True)
class Tile:
    """A key figure at the top of a page.

    Attributes:
        label: name of the figure.
        value: the figure, with its unit.
        note: line below it, such as its confidence interval.
        tone: colour of the value: ``good``, ``bad``, or none if empty.
    """

    label: str
    value: str
    note: str = ""
    tone: Literal["", "good", "bad"] = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row, and stays in view when the others are scrolled.

    Attributes:
        headings: headings of the columns.
        rows: texts of the cells, as many in each row as there are headings.
        caption: heading above the table; none if empty.
        text_columns: indices of the columns of text, aligned left; other columns hold numbers.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    text_columns: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Figure:
    """A chart with its visible title and a line about it."""

    title: str
    chart: Markup
    note: str = ""


def number(value: object) -> float | None:
    """``value`` from a file if it is a finite number, below :data:`_LARGEST` in magnitude; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer in JSON may be too large for a float
        return None
    return found if abs(found) < _LARGEST else None


def render(template: str, **context: object) -> str:
    """Render ``templates/<template>`` with the values in ``context``, as HTML.

    Text is escaped; charts, which are :class:`markupsafe.Markup`, are not. Lone surrogates, which Python
    makes of file names that are not UTF-8, become question marks, so that the page can be written as UTF-8.

    Raises:
        jinja2.UndefinedError: the template uses a name that ``context`` lacks.
    """
    text = environment().get_template(template).render(version=__version__, **context)
    return text.encode("utf-8", "replace").decode("utf-8")


def breakable(text: str) -> Markup:
    """Escaped text that may be broken after the dots, slashes and underscores of a name."""
    return Markup(re.sub(r"([._/])", r"\1<wbr>", str(escape(text))))


@cache
def environment() -> Environment:
    """The environment of jinja2 that reads and renders the templates; made once."""
    found = Environment(
        loader=PackageLoader("qat.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["breakable"] = breakable
    return found
