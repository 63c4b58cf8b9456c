"""What is asked of a model: how far top-1 may fall, how surely, and what decides where nothing is sure."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, get_args

from qat.evaluation import percent

#: What ends a comparison that cannot tell: the measured drop, or always the same.
OnInconclusive = Literal["measured", "pass", "fail"]
#: Percentage points that top-1 may fall where no rule says otherwise.
MAX_DROP: Final = 1.0


@dataclass(frozen=True)
class Rules:
    """What is asked of a model.

    Args:
        max_drop: the largest drop of top-1 that is allowed, in percentage points, 0 to 100; 1 where neither
            drop is given.
        max_relative_drop: the same in percent of the baseline's measured top-1, 0 to 100.
        confidence: of the one-sided bounds of the change, between 0.5 and 1.
        floor: least top-1 in percent, 0 to 100; the measured one is compared, without statistics.
        on_inconclusive: what a comparison that cannot tell ends as. ``measured`` fails where the measured
            drop is above the allowed one. With ``pass`` alone, a model whose true drop is within the allowed
            one fails with a probability of at most ``1 - confidence``; a broken floor is not counted.

    Raises:
        ValueError: out of range, or both drops; the message says what is allowed.
    """

    max_drop: float | None = None
    confidence: float = 0.95
    floor: float | None = None
    on_inconclusive: OnInconclusive = "measured"
    max_relative_drop: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges; comparisons are written so that NaN fails them."""
        if self.max_drop is not None and self.max_relative_drop is not None:
            raise ValueError("a drop in points and one relative to the baseline exclude each other: give one")
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise ValueError(f"{self.max_drop:g} is not a drop in percentage points, 0 to 100")
        if self.max_relative_drop is not None and not 0 <= self.max_relative_drop <= 100:
            raise ValueError(
                f"{self.max_relative_drop:g} is not a drop in percent of the baseline's top-1, 0 to 100"
            )
        if not 0.5 < self.confidence < 1:
            hint = f": write {self.confidence / 100:g}" if 50 < self.confidence < 100 else ", such as 0.95"
            raise ValueError(f"{self.confidence:g} is not a share between 0.5 and 1, both excluded{hint}")
        if self.floor is not None and not 0 <= self.floor <= 100:
            raise ValueError(f"{self.floor:g} is not an accuracy in percent, 0 to 100")
        if self.on_inconclusive not in get_args(OnInconclusive):
            raise ValueError(f"{self.on_inconclusive!r} is not one of {', '.join(get_args(OnInconclusive))}")

    def limit(self, correct: int, images: int) -> Fraction:
        """The allowed drop in percentage points, as the decimal numbers say it, without rounding.

        A relative drop is a share of the accuracy that the baseline measured, as benchmark rules have it, not
        of the unknown true one: ``max_relative_drop * correct / images``.

        Args:
            correct: images that the baseline has right.
            images: of the data set.
        """
        if self.max_relative_drop is not None:
            return Fraction(str(float(self.max_relative_drop))) * Fraction(correct, images)
        return Fraction(str(float(MAX_DROP if self.max_drop is None else self.max_drop)))

    def allowed(self, correct: int, images: int) -> str:
        """The allowed drop in words: in points, and where it is relative, what it is a share of."""
        limit = float(self.limit(correct, images))
        if self.max_relative_drop is None:
            return f"{limit:g}"
        measured = percent(100 * correct / images)
        return f"{limit:.4g} ({self.max_relative_drop:g} % of the baseline's {measured})"

    @property
    def sure(self) -> str:
        """The confidence in percent, to more digits than ``:g`` has: 0.9999999 is not 100 %."""
        return f"{100 * self.confidence:.12g} %"
