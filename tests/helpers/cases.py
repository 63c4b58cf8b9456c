"""Parameters of a test that cost more time than the others: ``slow(1, 2)`` stands where ``(1, 2)`` would."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pytest

#: Runs at each landing (`make test-all`), not in `make test`.
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
#: Runs only in `make test-nightly`.
exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)


def fast_where(fast: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters for all ``values``; those that are not among ``fast`` are marked slow."""
    return [value if value in fast else slow(value) for value in values]


def combinations(values: Mapping[str, Sequence[Any]]) -> pytest.MarkDecorator:
    """Parametrize a test by every combination of values, of which `make test` runs few.

    It runs as many as the longest list has values, so that each value of each parameter occurs; the others
    are slow. A combination with a value made by :func:`exhaustive` is exhaustive.

    Args:
        values: of each parameter; of several that belong together, named ``"a, b"``, tuples.
    """
    plain = [[value for value in found if not _marks(value)] for found in values.values()]
    fast = [[some[turn % len(some)] for some in plain] for turn in range(max(map(len, plain)))]
    parameters = []
    for combination in itertools.product(*values.values()):
        marks = [mark for value in combination for mark in _marks(value)]
        if not marks and list(combination) not in fast:
            marks = [pytest.mark.slow]
        flat: list[Any] = []
        for names, value in zip(values, combination, strict=True):
            inner = value.values if _marks(value) else (value,)
            flat += inner[0] if "," in names and not _marks(value) else inner
        parameters.append(pytest.param(*flat, marks=marks, id="-".join(map(str, flat))))
    return pytest.mark.parametrize(", ".join(values), parameters)


def _marks(value: Any) -> Sequence[Any]:
    return value.marks if isinstance(value, type(pytest.param())) else ()
