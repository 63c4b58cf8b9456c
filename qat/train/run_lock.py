"""One training at a time in a run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qat.errors import OutputError
from qat.runs import RunDirectory
from qat.system.collectives import is_main
from qat.train.state_file import FOLDER, LOCK, remove_leftovers


@contextmanager
def held(run: RunDirectory) -> Iterator[None]:
    """While entered, no other training can use the same run; what a killed one left half written is removed.

    Of several processes that train together the first one does this.

    Raises:
        OutputError: another process holds the run, or its folder can't be written.
    """
    if not is_main():
        yield
        return
    try:
        import fcntl
    except ImportError:  # Windows, where users have to keep two trainings apart themselves
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
            # processes that load data, which can outlive it, and would keep the run from being resumed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise OutputError(f"{run.path}: another process is training in this run") from error
        except OSError:  # a file system without locks
            pass
        for stage in (run, run.float_stage):
            remove_leftovers(stage.path)
        yield
