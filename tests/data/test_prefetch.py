"""Prefetching changes when items are made, but not which, and leaves no thread behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from qat.data.prefetch import prefetched


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_items_come_in_their_order(count: int) -> None:
    assert list(prefetched(iter(range(count)))) == list(range(count))
    assert threads() == []


def test_nothing_is_made_before_it_is_asked_for_and_no_more_than_said_ahead() -> None:
    made: list[int] = []
    asked = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            asked.release()
            yield i

    ahead = prefetched(items(), 2)
    assert made == []
    next(ahead)
    for _ in range(3):
        assert asked.acquire(timeout=10)
    assert made == [0, 1, 2]
    ahead.close()  # type: ignore[attr-defined]
    assert len(made) <= 3


def test_an_exception_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    found = prefetched(items())
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(found)
    assert threads() == []


def test_leaving_early_ends_the_thread_and_the_source() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    found = prefetched(items())
    next(found)
    assert len(threads()) == 1
    del found
    assert closed.is_set()
    assert threads() == []
