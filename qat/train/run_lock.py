"""Locks a run's folder, so that no two trainings use it at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qat.errors import OutputError
from qat.runs import RunDirectory
from qat.system.collectives import is_main
from qat.train.state_file import FOLDER, LOCK, remove_leftovers


@contextmanager
def locked(run: RunDirectory) -> Iterator[None]:
    """Context in which no other training can use the same run.

    On entering, half-written files of a training that was killed are removed. If several processes train
    together, the first one holds the lock.

    Raises:
        OutputError: another process trains in the run, or its folder can't be written.
    """
    if not is_main():
        yield
        return
    try:
        import fcntl
    except ImportError:  # Windows has no such locks, so users must not start two trainings in one run
        yield
        return
    path = run.path / FOLDER / LOCK
    try:
        path.parent.mkdir(exist_ok=True)
        lock = path.open("w", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    with lock:
        try:
            # A POSIX record lock ends with this process. A lock of flock() would be inherited by the
            # processes that load data. These can outlive this process, and would then keep the run from being
            # resumed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise OutputError(f"{run.path}: another process is training in this run") from error
        except OSError:  # the file system has no locks
            pass
        for stage in (run, run.float_stage):
            remove_leftovers(stage.path)
        yield
