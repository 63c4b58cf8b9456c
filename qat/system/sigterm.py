"""A request to stop, as batch systems and spot instances make it: SIGTERM, and time to save."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """While entered, the first SIGTERM is noted in ``requested``; a second one ends the process at once.

    Not so where it is one of several processes (``patient``): their launcher passes on what a batch system
    may have sent to each of them already, and ends those that take too long by itself.

    Where no signal can be caught, that is outside of the main thread, or where SIGTERM is ignored already,
    nothing changes.
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
        """Leave SIGTERM to the system again."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self.patient:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
