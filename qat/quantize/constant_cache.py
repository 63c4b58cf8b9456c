"""A cache for the constants of integer modules: made once for an evaluation of many batches.

A fake-quantized module derives its integer constants from its parameters, statistics and grids. Any of these
may have changed since the last batch, so by default the constants are made anew for each one, which takes a
third of the time of a batch for tens of millions of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)


class HasIntegers(Protocol[T_co]):
    """A module that computes integers."""

    def integers(self) -> T_co:
        """Its constants."""


_kept: ContextVar[dict[Any, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def keeping_constants() -> Iterator[None]:
    """Keep the constants that are made inside of the block until its end.

    The caller promises that no parameter, statistic or grid of a network that this thread evaluates changes
    meanwhile.
    """
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def integers_of(module: HasIntegers[T_co]) -> T_co:
    """``module.integers()``; inside of :func:`keeping_constants` the result of the first call."""
    kept = _kept.get()
    if kept is None:
        return module.integers()
    if module not in kept:
        kept[module] = module.integers()
    found: T_co = kept[module]
    return found
