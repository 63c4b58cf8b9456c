"""Which images changed sides between a baseline and a model, and in which direction.

A baseline holds one bit per image, so its answer to an image that it had wrong is not known.
An image that both have wrong is no change here, whatever the answers were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

#: Images of each direction that are kept, and that a text lists.
KEPT: Final = 1000
LISTED: Final = 50


@dataclass(frozen=True)
class Flip:
    """An image that exactly one of the two models has right.

    Attributes:
        index: its place in the data set, from 0.
        image: what the data set calls it, such as a file's name; ``None`` where it has no name.
        became: what the model's answer is, after the opposite of the baseline.
        true_class: name of the class.
        baseline_answer: name of the baseline's class; ``None`` where it was wrong: it is not recorded.
        answer: name of the model's class; ``None`` where its logits are NaN.
    """

    index: int
    image: str | None
    became: Literal["wrong", "right"]
    true_class: str
    baseline_answer: str | None
    answer: str | None

    def line(self) -> str:
        """One line for people."""
        name = "" if self.image is None else f" ({self.image})"
        image = f"image {self.index}{name} of class {self.true_class}"
        if self.became == "right":
            return f"wrong → right: {image}"
        now = "without an answer, its logits are NaN" if self.answer is None else self.answer
        return f"right → wrong: {image}, now {now}"


@dataclass(frozen=True)
class Flips:
    """The images that changed sides, in the order of the data set.

    Attributes:
        lost, gained: numbers of images that became wrong, and that became right.
        images: those that became wrong, then those that became right; the first :data:`KEPT` of each.
    """

    lost: int
    gained: int
    images: Sequence[Flip]

    def lines(self) -> list[str]:
        """Lines for people: numbers, then at most :data:`LISTED` images of each direction."""
        if not self.images:
            return ["no image changed sides"]
        found = [f"images that changed sides: {self.lost:,} right → wrong, {self.gained:,} wrong → right"]
        for became, count in (("wrong", self.lost), ("right", self.gained)):
            shown = [flip.line() for flip in self.images if flip.became == became][:LISTED]
            found += shown
            if len(shown) < count:
                found.append(f"… and {count - len(shown):,} more that became {became}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the numbers, and a list of at most :data:`KEPT` images of each direction."""
        return {
            "became_wrong": self.lost,
            "became_right": self.gained,
            "images": [asdict(flip) for flip in self.images],
        }


def find_flips(
    before: NDArray[np.bool_],
    now: NDArray[np.bool_],
    labels: Sequence[int],
    answers: Sequence[int | None],
    class_names: Sequence[str],
    image_name: Callable[[int], str | None],
) -> Flips:
    """Find the images that changed sides.

    Args:
        before, now: whether the baseline, and the model, have each image right; (N,).
        labels: true classes (N,).
        answers: classes that the model answers (N,); ``None`` where it has no answer.
        class_names: by class. A class beyond them, which logits may have, is called by its number.
        image_name: the name of the image at an index, if it has one.
    """

    def name(answer: int | None) -> str | None:
        if answer is None:
            return None
        return _printable(class_names[answer]) if answer < len(class_names) else f"class {answer}"

    def flip(index: int, became: Literal["wrong", "right"]) -> Flip:
        true, called = name(labels[index]), image_name(index)
        assert true is not None
        return Flip(
            index=index,
            image=None if called is None else _printable(called),
            became=became,
            true_class=true,
            baseline_answer=true if became == "wrong" else None,
            answer=name(answers[index]),
        )

    lost: list[int] = np.flatnonzero(before & ~now).tolist()
    gained: list[int] = np.flatnonzero(now & ~before).tolist()
    became_wrong = [flip(index, "wrong") for index in lost[:KEPT]]
    became_right = [flip(index, "right") for index in gained[:KEPT]]
    return Flips(len(lost), len(gained), [*became_wrong, *became_right])


def _printable(text: str) -> str:
    """A name of a file or class: what a terminal or a CI log would act on is escaped."""
    return text if text.isprintable() else ascii(text)[1:-1]
