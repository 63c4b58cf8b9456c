"""HTML pages that are one file each: no network, no script, readable on a phone, in the dark and on paper.

``templates/base.html`` has the frame and the colours, ``templates/parts.html`` the macros ``section``,
``tiles``, ``figure``, ``grid``, ``table`` and ``fold``. A page extends the one and imports the others.
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

#: What stands for a number that is not there.
ABSENT: Final = "–"
#: No measurement comes near, and no axis has room for the digits of more.
_LARGEST: Final = 1e15


@dataclass(frozen=True)
class Tile:
    """A key figure: what it is, its value, and a line below.

    Attributes:
        label: what it is.
        value: the figure, with its unit.
        note: what else belongs to it, such as its confidence interval.
        tone: ``good`` and ``bad`` colour the value.
    """

    label: str
    value: str
    note: str = ""
    tone: Literal["", "good", "bad"] = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row and stays in sight when the others are scrolled.

    Attributes:
        headings: of the columns.
        rows: texts, as many as headings in each.
        caption: heading above the table, where it is not empty.
        text_columns: numbers of the columns that are text, flush left; the others are numbers.
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
    """A number from a file that is finite and below :data:`_LARGEST`, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # JSON has whole numbers of any length
        return None
    return found if abs(found) < _LARGEST else None


def render(template: str, **context: object) -> str:
    """The page that ``templates/<template>`` makes of ``context``, as HTML.

    Text is escaped; charts, which are :class:`markupsafe.Markup`, are not. A name that the template uses and
    ``context`` lacks is a programming error (``jinja2.UndefinedError``). Half surrogates, as names of files
    that are not UTF-8 have them, become question marks: the result can always be written as UTF-8.
    """
    text = environment().get_template(template).render(version=__version__, **context)
    return text.encode("utf-8", "replace").decode("utf-8")


def breakable(text: str) -> Markup:
    """Escaped text that may be broken after the dots, slashes and underscores of a name."""
    return Markup(re.sub(r"([._/])", r"\1<wbr>", str(escape(text))))


@cache
def environment() -> Environment:
    """What templates are read and filled in with; made once."""
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
