"""Memory that a training gives back and asks for anew, step after step, stays with the process."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

# Parameters of mallopt (malloc.h).
_TRIM_THRESHOLD: Final = -1
_TOP_PAD: Final = -2
_MMAP_THRESHOLD: Final = -3

#: Blocks of fewer bytes come from the heap, where they are used again.
LARGEST_BLOCK: Final = 2**30
OLD_LARGEST_BLOCK: Final = 2**25
#: Bytes that the heap grows by beyond what is asked for.
MARGIN: Final = 2**26


def keep_pages() -> bool:
    """Let the C library keep freed memory instead of returning it to the system.

    Each step frees its activations and gradients, and the next one asks for as much. Returned to the system
    in between, every page of it costs a fault and is filled with zeros: a tenth of a step's time. The most
    memory that the process holds hardly changes; what it holds between steps is that most.

    Returns:
        Whether the C library can: glibc can, others are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # Before 2.35 glibc takes half of 64 MB at most, and the other two alone would fix that limit at 128 kB.
    if not any(library.mallopt(_MMAP_THRESHOLD, size) == 1 for size in (LARGEST_BLOCK, OLD_LARGEST_BLOCK)):
        return False
    taken = [library.mallopt(_TRIM_THRESHOLD, 2**31 - 1), library.mallopt(_TOP_PAD, MARGIN)]
    return taken == [1, 1]
