"""Makes the next items of an iterator in a thread while the current one is used."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")

_END: Final = object()


def prefetched(items: Iterator[T], ahead: int = 2) -> Iterator[T]:
    """Yield ``items`` in their order, while one thread makes up to ``ahead`` further ones.

    This saves time if making an item releases the interpreter's lock, as decoding an image does. No item is
    made before the first one is asked for. An exception of ``items`` is raised in place of the item that
    caused it. If the consumer stops early and the iterator is closed or collected, the thread finishes its
    current item and ends.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    ended = sys.is_finalizing  # kept in a local, since globals are gone at the end of the interpreter
    pending: deque[Future[object]] = deque(thread.submit(next, items, _END) for _ in range(ahead))
    try:
        while (item := pending.popleft().result()) is not _END:
            pending.append(thread.submit(next, items, _END))
            yield item  # type: ignore[misc]  # _END is the only other thing
    finally:
        if not ended():
            thread.shutdown(cancel_futures=True)
            close = getattr(items, "close", None)  # closing a generator ends its worker processes
            if close is not None:
                close()
