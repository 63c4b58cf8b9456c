"""Notes SIGTERM, by which batch systems and spot instances ask a process to save its work and stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """Context in which the first SIGTERM sets ``requested``, and a second one ends the process at once.

    With ``patient``, further SIGTERMs are noted, too, and don't end the process. That is for one of several
    processes under a launcher: a batch system may send the signal to each process, and the launcher passes it
    on once more. The launcher itself ends processes that take too long.

    Nothing changes outside of the main thread, where signals can't be caught, or if SIGTERM is handled or
    ignored already.

    Attributes:
        requested: whether SIGTERM has come.
        patient: whether a second SIGTERM is noted like the first.
    """

    def __init__(self, patient: bool = False) -> None:
        self.requested = False
        self.patient = patient
        self._before: object = None

    def __enter__(self) -> StopRequest:
        """Catch SIGTERM from here on."""
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Give SIGTERM its default effect again, which is to end the process."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self.patient:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
