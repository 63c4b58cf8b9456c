"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from qat.errors import OutputError

#: What the file system says no with. RuntimeError: a loop of links, before Python 3.13.
_REFUSALS: Final = (OSError, RuntimeError, ValueError)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` in one step. Its folder must be there: a misspelt one is not made.

    The bytes go to a temporary file in the same folder, reach the disk, and then take the name: whoever
    reads ``path`` finds the old content or the new one. A failed write leaves no file behind. A symbolic
    link is followed, not replaced.

    Args:
        path: file to create or replace.
        data: bytes, or text to be stored as UTF-8 with its line ends as they are.

    Raises:
        OutputError: ``path`` cannot be written; the message has the reason.
    """
    payload = data.encode() if isinstance(data, str) else data
    with replacing(path) as temporary:
        temporary.write_bytes(payload)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path in the folder of ``path``; what the block writes there takes the name ``path`` at its end.

    For content too large to be held in memory a second time; else see :func:`write_atomically`, which this
    is the whole of.

    Args:
        path: file to create or replace.

    Raises:
        OutputError: ``path`` cannot be written, or the block raised ``OSError``.
    """
    try:
        target = _target(path)
        if not target.parent.exists():
            raise OutputError(f"{path}: cannot be written: there is no folder {target.parent}")
        temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
        try:
            # Exclusive creation, with the permissions that the user's umask gives any new file.
            temporary.open("xb").close()
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except _REFUSALS as error:
        raise _unwritable(path, error) from error


def require_writable(path: Path) -> None:
    """Find out, before long work, that ``path`` can't be written after it; nothing is created.

    Raises:
        OutputError: :func:`write_atomically` would refuse it now. It may still fail later: disks fill up.
    """
    try:
        folder = _target(path).parent
        if not folder.exists():
            raise OutputError(f"{path}: cannot be written: there is no folder {folder}")
        if not folder.is_dir():
            raise OutputError(f"{path}: cannot be written: {folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: cannot be written: no permission to write in {folder}")
    except _REFUSALS as error:
        raise _unwritable(path, error) from error


def _target(path: Path) -> Path:
    """The file to write, behind all links."""
    target = path.resolve()
    # Replacing a device such as /dev/null by a file would be much worse than refusing.
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "not a regular file"
        raise OutputError(f"{path}: cannot be written: it is {kind}")
    return target


def _unwritable(path: Path, error: Exception) -> OutputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OutputError(f"{path}: cannot be written: {reason}")
