"""Keeps freed memory with the process, because training frees it and asks for it again in every step."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

# Parameters of mallopt (malloc.h).
_TRIM_THRESHOLD: Final = -1
_TOP_PAD: Final = -2
_MMAP_THRESHOLD: Final = -3

#: Blocks of fewer bytes than this are taken from the heap, which reuses them after they are freed.
LARGEST_BLOCK: Final = 2**30
#: The same for glibc before 2.35, which refuses more than half of 64 MiB.
OLD_LARGEST_BLOCK: Final = 2**25
#: Bytes by which the heap grows beyond what was asked for.
MARGIN: Final = 2**26


def keep_pages() -> bool:
    """Let the C library keep freed memory instead of returning it to the system.

    Each step frees its activations and gradients, and the next step asks for as much memory. If the memory
    went back to the system in between, each of its pages would cost a page fault and be filled with zeros,
    which takes a tenth of a step's time. The process's peak memory hardly changes, but it holds that peak
    between steps, too.

    Returns:
        Whether freed memory is kept. It is with glibc; other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # glibc adapts this threshold by itself, until any of the three parameters is set. So if it can't be
    # raised, the other two are not set either: the threshold would stay at 128 KiB.
    if not any(library.mallopt(_MMAP_THRESHOLD, size) == 1 for size in (LARGEST_BLOCK, OLD_LARGEST_BLOCK)):
        return False
    taken = [library.mallopt(_TRIM_THRESHOLD, 2**31 - 1), library.mallopt(_TOP_PAD, MARGIN)]
    return taken == [1, 1]
