"""Files of a data set that cannot be used: what is wrong with each, and all of them in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from qat.errors import DataError

__all__ = ["Kind", "Problem", "counted", "counts", "refusal", "shown"]

#: What is wrong with a file; also the order in which they are told.
Kind = Literal["dangling link", "unreadable", "foreign", "broken"]

#: Files of each kind that a line names.
_NAMED: Final = 5
_PLURALS: Final[dict[Kind, str]] = {"dangling link": "dangling links"}


@dataclass(frozen=True)
class Problem:
    """One file that cannot be used.

    Attributes:
        name: of the file, or file and row.
        kind: ``dangling link``: points to nothing, or in a circle; ``unreadable``: the system refuses to
            read it; ``foreign``: not an image, or of a format that is not read here; ``broken``: an image
            that cannot be decoded.
        reason: in words.
    """

    name: str
    kind: Kind
    reason: str


def shown(name: str) -> str:
    """A name as a terminal may be given it: what cannot be printed is escaped."""
    return name if name.isprintable() else name.encode("unicode_escape", "backslashreplace").decode()


def counts(problems: Sequence[Problem]) -> dict[str, int]:
    """Number of each kind that there is, under its name in singular or plural."""
    found = Counter(one.kind for one in problems)
    return {
        kind if found[kind] == 1 else _PLURALS.get(kind, kind): found[kind]
        for kind in get_args(Kind)
        if found[kind]
    }


def counted(problems: Sequence[Problem], folder: object = None) -> str:
    """Number and first names of each kind, such as ``2 broken (cat/1.png, cat/7.png)``.

    Names are shown as they are in ``folder``, if they lie there.
    """
    parts = []
    for kind in get_args(Kind):
        names = [shown(one.name.removeprefix(f"{folder}/")) for one in problems if one.kind == kind]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            word = kind if len(names) == 1 else _PLURALS.get(kind, kind)
            parts.append(f"{len(names)} {word} ({', '.join(names[:_NAMED])}{more})")
    return ", ".join(parts)


def refusal(problems: Sequence[Problem], source: object) -> DataError:
    """The error that says which files of ``source`` cannot be used, and what to do about them."""
    files = "1 file" if len(problems) == 1 else f"{len(problems)} files"
    why = f": {problems[0].reason}" if len(problems) == 1 else ""
    return DataError(
        f"{source}: {files} cannot be used: {counted(problems, source)}{why}; repair or remove what is "
        "named, or leave it out with --set data.on_error=skip (`qat data check` decodes every image and "
        "names all)"
    )
