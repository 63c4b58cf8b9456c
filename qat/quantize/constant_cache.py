"""Constants of an integer network, made once for many batches.

They follow from parameters, statistics and grids, and a twin makes them anew for each batch, since any of
these may have changed: of tens of millions of weights, a third of the time of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)


class HasIntegers(Protocol[T_co]):
    """A twin that computes integers."""

    def integers(self) -> T_co:
        """Its constants."""


_held: ContextVar[dict[Any, Any] | None] = ContextVar("held", default=None)


@contextmanager
def unchanged() -> Iterator[None]:
    """No parameter, statistic or grid of any network that this thread evaluates changes meanwhile."""
    token = _held.set({})
    try:
        yield
    finally:
        _held.reset(token)


def held_integers(twin: HasIntegers[T_co]) -> T_co:
    """``twin.integers()``, inside :func:`unchanged` those of the first call."""
    held = _held.get()
    if held is None:
        return twin.integers()
    if twin not in held:
        held[twin] = twin.integers()
    found: T_co = held[twin]
    return found
