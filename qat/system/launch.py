"""Which process this is, and its share of the work: what launchers tell it, read without loading torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Share:
    """One of ``size`` consecutive parts of a batch: number ``rank``, from 0. Parts differ by one at most."""

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> slice:
        """Where the part lies in a batch of ``count``; empty if there are more parts than that."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


WHOLE: Final = Share()


@dataclass(frozen=True)
class World:
    """This process among those that compute together.

    Attributes:
        rank: its number, from 0; 0 alone writes and prints.
        size: how many there are.
        local_rank: its number among those of its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def share(self) -> Share:
        """Its part of each batch."""
        return Share(self.rank, self.size)


def is_set(name: str) -> bool:
    """Whether an environment variable of a launcher says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def launched() -> World:
    """As `torchrun` and `accelerate launch` say it in the environment; one process alone where they don't."""
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return World(rank, size, int(os.environ.get("LOCAL_RANK", rank)))
    except (KeyError, ValueError):  # none of these launchers, which set all of them
        return World()
