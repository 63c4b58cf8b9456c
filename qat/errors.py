"""One tree of exceptions. Each class carries the exit code with which its failure ends a command.

Exit codes: 0 for success, 1 where the work ran but its result is not good enough, 2 where the input is wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QatError(Exception):
    """Base of every error that a user is meant to read. The message is complete without a traceback."""

    exit_code = 2


class RecipeError(QatError):
    """A recipe is missing or malformed, or contradicts itself."""


class CheckpointError(QatError):
    """A checkpoint cannot be read, or does not fit the network."""


class DataError(QatError):
    """A data set is missing, unreadable, or does not fit the network."""


class QuantizationError(QatError):
    """A network cannot be prepared or lowered as asked."""


class NativeLibraryError(QatError):
    """The native library is missing, can't be loaded, or lacks the kernels that were asked for."""


class OutputError(QatError):
    """A file or directory cannot be written."""


class TrainingError(QatError):
    """Training stopped because its result would be worthless (a loss that is not finite)."""

    exit_code = 1


class Stopped(QatError):  # noqa: N818 - it is not called an error, because the run did what it was asked to
    """SIGTERM asked a training run to stop; its state is saved."""

    exit_code = 143  # 128 + 15 (SIGTERM), as shells report a process that a signal ended


class VerificationError(QatError):
    """An exported model differs from the network it came from by more than the stated bound."""

    exit_code = 1


class BaselineError(QatError):
    """A baseline is missing or damaged, or was recorded of a data set or model that can't be compared."""


class GateError(QatError):
    """The accuracy gate failed: a model got worse than its baseline, or than a limit that the user gave."""

    exit_code = 1


class NotBinaryError(QatError):
    """A network was required to use weights of exactly ±1, and doesn't."""

    exit_code = 1


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the allowed name closest to ``name``, else an empty string."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
