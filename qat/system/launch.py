"""Which of several processes this is, and its share of each batch.

Launchers such as torchrun say so in environment variables, which are read here without loading torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Share:
    """Part number ``rank`` (from 0) of ``size`` consecutive parts of a batch.

    The parts are equal, or differ by one image.
    """

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> slice:
        """The positions of this part in a batch of ``count`` images; it can be empty if ``count < size``."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


#: The share of a process that works alone: the whole batch.
WHOLE: Final = Share()


@dataclass(frozen=True)
class World:
    """This process's place among the processes that compute together.

    Attributes:
        rank: number of this process, from 0. Process 0 alone writes files and prints.
        size: number of processes.
        local_rank: number of this process among those on its machine, from 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def share(self) -> Share:
        """This process's part of each batch."""
        return Share(self.rank, self.size)


def is_set(name: str) -> bool:
    """Whether the environment variable ``name`` is ``1``, ``true`` or ``yes``, in any case."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def launched() -> World:
    """This process's place according to the environment variables of `torchrun` and `accelerate launch`.

    It is one process alone where ``RANK`` or ``WORLD_SIZE`` is missing or not an integer.
    """
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return World(rank, size, int(os.environ.get("LOCAL_RANK", rank)))
    except (KeyError, ValueError):  # started by none of these launchers, which set both variables
        return World()
