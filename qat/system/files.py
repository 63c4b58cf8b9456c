"""Writes files atomically, so that a reader never sees half of one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from qat.errors import OutputError

#: Exceptions that mean that the file system refused. RuntimeError is a loop of links before Python 3.13.
_REFUSALS: Final = (OSError, RuntimeError, ValueError)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` in one step. Its folder must be there: a misspelt one is not made.

    The bytes are written to a temporary file in the same folder and flushed to the disk. Then the temporary
    file is renamed to ``path``, so that a reader of ``path`` finds either the old content or the new. A
    failed write leaves no file behind. A symbolic link is followed, not replaced.

    Args:
        path: file to create or replace.
        data: bytes, or text, which is stored as UTF-8 with unchanged line ends.

    Raises:
        OutputError: ``path`` cannot be written; the message has the reason.
    """
    payload = data.encode() if isinstance(data, str) else data
    with replacing(path) as temporary:
        temporary.write_bytes(payload)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context in which a temporary file is written that becomes ``path`` when the block ends.

    It does for content of any size what :func:`write_atomically` does for content that is in memory. If the
    block raises an exception, the temporary file is removed and ``path`` stays as it was.

    Args:
        path: file to create or replace.

    Yields:
        The path of the temporary file, which exists already and is empty.

    Raises:
        OutputError: ``path`` cannot be written, or the block raised ``OSError``.
    """
    try:
        target = _target(path)
        if not target.parent.exists():
            raise OutputError(f"{path}: cannot be written: there is no folder {target.parent}")
        temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
        try:
            # Mode "x" refuses an existing file. Permissions are those that the umask gives any new file.
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
    """Check that ``path`` can be written, before long work whose result goes there. Nothing is created.

    Writing may still fail later, for example because the disk is full by then.

    Raises:
        OutputError: :func:`write_atomically` would refuse to write ``path`` now.
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
    """The file that ``path`` refers to after all symbolic links are followed.

    Raises:
        OutputError: it exists and is not a regular file.
    """
    target = path.resolve()
    # Renaming a file to the name of a device, such as /dev/null, would replace the device.
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "not a regular file"
        raise OutputError(f"{path}: cannot be written: it is {kind}")
    return target


def _unwritable(path: Path, error: Exception) -> OutputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OutputError(f"{path}: cannot be written: {reason}")
