"""SIGTERM is caught once, and afterwards has its default effect again."""

from __future__ import annotations

import os
import signal
import threading

from qat.system.sigterm import StopRequest


def test_the_first_sigterm_is_noted_and_the_second_left_to_the_system() -> None:
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_one_of_several_processes_lets_further_ones_pass() -> None:
    with StopRequest() as stop:
        stop.patient = True
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_without_a_signal_nothing_is_left_behind() -> None:
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert not stop.requested
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_ignored_or_handled_already_stays_so() -> None:
    seen = []
    for handler in (signal.SIG_IGN, lambda number, frame: seen.append(number)):
        signal.signal(signal.SIGTERM, handler)
        try:
            with StopRequest() as stop:
                os.kill(os.getpid(), signal.SIGTERM)
            assert not stop.requested
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen == [signal.SIGTERM]


def test_outside_of_the_main_thread_nothing_is_caught() -> None:
    found = []

    def enter() -> None:
        with StopRequest():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]
