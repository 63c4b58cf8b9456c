"""Whether images can be read: by their headers, which takes microseconds each, or by decoding them."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from PIL import Image, UnidentifiedImageError

from qat.data.decode import Encoded, formats, opened_image
from qat.data.problems import Kind, Problem
from qat.errors import DataError

__all__ = ["probe", "probe_headers"]

#: Images that are waited for at a time.
_AT_ONCE: Final = 256
_MOST_THREADS: Final = 8
#: What PNG and JPEG files begin with. Pillow, which knows the others, takes five times as long to tell.
_SIGNATURES: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


def probe_headers(images: Encoded, rows: Sequence[int]) -> dict[int, Problem]:
    """The images at ``rows`` that are none, as their first bytes tell, by row; pixels are not read."""
    return dict(_probed(images, rows, _open, lambda: None))


def probe(
    images: Encoded, rows: Sequence[int], *, turn: bool = False, tick: Callable[[], None] = lambda: None
) -> dict[int, Problem]:
    """The images at ``rows`` that cannot be decoded, by row. ``tick`` is called after each image."""

    def decode(source: Path | bytes) -> None:
        opened_image(source, turn=turn)

    return dict(_probed(images, rows, decode, tick))


def _probed(
    images: Encoded,
    rows: Sequence[int],
    look: Callable[[Path | bytes], None],
    tick: Callable[[], None],
) -> Iterator[tuple[int, Problem]]:
    def problem(row: int) -> Problem | None:
        try:
            look(images.image(row))
        except Exception as error:  # of a file that may hold anything
            kind, reason = _told(error)
            if kind == "foreign" and _is_empty(images, row):
                reason = "is empty"
            return Problem(images.name(row), kind, reason)
        return None

    with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            for row, found in zip(part, pool.map(problem, part), strict=True):
                tick()
                if found is not None:
                    yield row, found


def _open(source: Path | bytes) -> None:
    if isinstance(source, bytes):
        opened_image(source)
        return
    with source.open("rb", buffering=0) as file:
        if (file.read(len(_SIGNATURES[0])) or b"").startswith(_SIGNATURES):
            return
    with Image.open(source, formats=formats()):
        pass


def _is_empty(images: Encoded, row: int) -> bool:
    try:
        source = images.image(row)
        return (source.stat().st_size if isinstance(source, Path) else len(source)) == 0
    except (OSError, DataError):
        return False


def _told(error: Exception) -> tuple[Kind, str]:
    """Kind and reason of what came up while an image was opened or decoded."""
    cause = error.__cause__ if isinstance(error, DataError) and error.__cause__ is not None else error
    if isinstance(cause, UnidentifiedImageError):
        return "foreign", "no image of a known format"
    if isinstance(cause, OSError) and cause.errno is not None and cause.strerror:
        return "unreadable", cause.strerror
    if isinstance(cause, DataError):  # a cell without an image
        return "foreign", str(cause).rpartition(": ")[2]
    known = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
    text = str(cause).strip()
    return "broken", text if text and isinstance(cause, known) else f"{type(cause).__name__} {text}".strip()
