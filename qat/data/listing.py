"""What lies in a folder of classes: images by class, and files that cannot be images though they seem to be.

A class is a folder; its images lie anywhere beneath. Folders and images may be symbolic links. What is hidden
(a leading dot) and what is no picture, a ``.txt`` or ``.zip`` say, is passed over.
"""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from PIL import Image

from qat.data.decode import formats
from qat.data.problems import Problem, shown
from qat.errors import DataError

__all__ = ["ClassFolders", "Listing", "class_folders", "direct_images", "list_images", "same_name"]

#: Folders that systems and archives leave behind.
_LEFT_BEHIND: Final = frozenset({"__MACOSX", "@eaDir"})
#: Suffixes of pictures that Pillow does not read, or not alone: they are not passed over in silence.
_FOREIGN: Final = frozenset(
    {".arw", ".avif", ".cr2", ".cr3", ".dng", ".emf", ".eps", ".heic"}
    | {".heif", ".jxl", ".nef", ".orf", ".raw", ".rw2", ".svg", ".wmf"}
)


@functools.cache
def _readable() -> frozenset[str]:
    """Suffixes of files that are images."""
    found = formats()
    every = {suffix for suffix, name in Image.registered_extensions().items() if name in found}
    return frozenset(every - {".pfm"})  # floating point pixels, which have no defined range


def same_name(name: str) -> str:
    """``name`` in the one form (NFC) that composed and decomposed accents have in common.

    Archives and copies from one system to another turn the forms into each other.
    """
    return unicodedata.normalize("NFC", name)


@dataclass(frozen=True)
class ClassFolders:
    """Names of the folders beneath one, in order, and links there that lead nowhere."""

    names: list[str]
    problems: list[Problem]


def class_folders(parent: Path) -> ClassFolders:
    """The folders of classes in ``parent``.

    Raises:
        DataError: it cannot be read, or two of them have names that look the same.
    """
    names, problems = [], []
    try:
        with os.scandir(parent) as entries:
            for entry in entries:
                if _hidden(entry.name):
                    continue
                if (wrong := _dead_link(entry)) is not None:
                    if Path(entry.name).suffix.lower() in _readable() | {""}:
                        problems.append(Problem(entry.path, "dangling link", wrong))
                elif entry.is_dir():
                    names.append(entry.name)
    except OSError as error:
        raise DataError(f"{parent}: cannot be listed: {error.strerror}") from error
    names.sort()
    forms: dict[str, str] = {}
    for name in names:
        other = forms.setdefault(same_name(name), name)
        if other != name:
            raise DataError(
                f"{parent}: the folders {other!a} and {name!a} have names that look the same "
                "(Unicode forms NFD and NFC); merge them into one"
            )
    return ClassFolders(names, problems)


@dataclass
class Listing:
    """Images of some classes.

    Attributes:
        files: paths relative to the folder of the classes, sorted part by part.
        problems: files that cannot be used, as far as their names and links tell.
        passed_over: number of files that are no pictures.
        example: the first of these.
    """

    files: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    passed_over: int = 0
    example: str | None = None


def list_images(folder: Path, classes: Iterable[str]) -> Listing:
    """The images beneath ``folder`` in the folders ``classes``."""
    found = Listing()
    for name in classes:
        _walk(str(folder), name, found)
    found.files.sort(key=lambda path: path.split("/"))
    return found


def _walk(folder: str, name: str, found: Listing) -> None:
    """Add what lies anywhere in the class folder ``folder/name`` to ``found``."""
    waiting = [(name, frozenset([_identity(folder)]))]
    while waiting:
        relative, above = waiting.pop()
        path = f"{folder}/{relative}"
        try:
            this = _identity(path)
            with os.scandir(path) as entries:
                here = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            found.problems.append(Problem(path, "unreadable", f"cannot be listed: {error.strerror}"))
            continue
        if this in above:
            found.problems.append(Problem(path, "dangling link", "leads to a folder that it lies in"))
            continue
        for entry in here:
            inner = f"{relative}/{entry.name}"
            if _hidden(entry.name):
                continue
            wrong = _dead_link(entry)
            if wrong is None and entry.is_dir():
                waiting.append((inner, above | {this}))
                continue
            problem = _file_problem(entry, wrong)
            if problem is not None:
                found.problems.append(problem)
            elif Path(entry.name).suffix.lower() in _readable():
                found.files.append(inner)
            else:
                found.passed_over += 1
                found.example = found.example or entry.path


def _identity(path: str) -> tuple[int, int]:
    """What two paths have in common that lead to one folder."""
    status = Path(path).stat()
    return status.st_dev, status.st_ino


def _file_problem(entry: os.DirEntry[str], wrong: str | None) -> Problem | None:
    """What is wrong with a file that seems to be an image; ``wrong`` with a link."""
    suffix = Path(entry.name).suffix.lower()
    if wrong is not None:
        # A link without suffix may have led to a folder of images.
        return Problem(entry.path, "dangling link", wrong) if suffix in _readable() | {""} else None
    if suffix not in _readable():
        if suffix not in _FOREIGN:
            return None
        return Problem(entry.path, "foreign", f"{suffix} is not read; convert it to JPEG or PNG")
    if not entry.is_file():  # a pipe, say: opening it would wait for ever
        return Problem(entry.path, "foreign", "is no regular file")
    return None


def _dead_link(entry: os.DirEntry[str]) -> str | None:
    """What is wrong with a symbolic link, in words; ``None`` for anything else."""
    if not entry.is_symlink():
        return None
    try:
        entry.stat()
    except OSError as error:
        return f"link that leads nowhere: {error.strerror}"
    return None


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _LEFT_BEHIND


def direct_images(folder: Path) -> Iterator[str]:
    """Names of images that lie directly in ``folder``, outside of any class."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _hidden(entry.name) and Path(entry.name).suffix.lower() in _readable():
                yield entry.name


def named(names: Sequence[str], most: int = 5) -> str:
    """The first names, quoted, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{shown(name)}'" for name in names[:most]) + more
