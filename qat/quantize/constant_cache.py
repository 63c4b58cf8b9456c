"""A cache for the integer constants of a network, for an evaluation of many batches.

A fake-quantized module computes its integer constants from its parameters, statistics and grids. Any of these
may have changed since the last batch, so by default the constants are computed for every batch. With tens of
millions of weights, that is a third of the time of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)


class HasIntegers(Protocol[T_co]):
    """A module that can compute with integers."""

    def integers(self) -> T_co:
        """The constants of its integer computation."""


_kept: ContextVar[dict[Any, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def keeping_constants() -> Iterator[None]:
    """Compute each module's constants once in the block, and keep them until its end.

    The caller must not change any parameter, statistic or grid of a network that this thread evaluates in the
    block.
    """
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def integers_of(module: HasIntegers[T_co]) -> T_co:
    """``module.integers()``; in a block of :func:`keeping_constants`, the result of the first call in it."""
    kept = _kept.get()
    if kept is None:
        return module.integers()
    if module not in kept:
        kept[module] = module.integers()
    found: T_co = kept[module]
    return found
