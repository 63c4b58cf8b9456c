"""An iterator that works ahead in a thread while its items are used."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")

_END: Final = object()


def prefetched(items: Iterator[T], ahead: int = 2) -> Iterator[T]:
    """Yield ``items`` in their order; one thread makes up to ``ahead`` of them beforehand.

    It pays where making an item leaves the interpreter free, as decoding an image does. Nothing is made
    before the first item is asked for. An exception of ``items`` comes out where its item would have. A
    consumer that stops early ends the thread after the item it is at, when the iterator is closed or
    collected.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    ended = sys.is_finalizing  # a local: globals are gone when an iterator outlives its program
    pending: deque[Future[object]] = deque(thread.submit(next, items, _END) for _ in range(ahead))
    try:
        while (item := pending.popleft().result()) is not _END:
            pending.append(thread.submit(next, items, _END))
            yield item  # type: ignore[misc]  # _END is the only other thing
    finally:
        if not ended():
            thread.shutdown(cancel_futures=True)
            close = getattr(items, "close", None)  # of a generator: its worker processes end with it
            if close is not None:
                close()
