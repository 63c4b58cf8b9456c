"""The classes that two networks put the same images into, which ones they confuse, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from qat.data.split import Split
from qat.evaluation import Predict, input_for
from qat.gate.paired_statistics import Pairs
from qat.recipe.schema import Data

#: Largest number of changed images that are kept of each kind of change.
KEPT: Final = 48


@dataclass(frozen=True)
class ChangedImage:
    """An image that the two networks put into different classes.

    Attributes:
        index: index of the image in the split.
        pixels: the image as the networks see it, but not normalized: uint8 (3, H, W).
        label, before, after: the true class, and the answers of the first and the second network.
    """

    index: int
    pixels: Tensor
    label: int
    before: int
    after: int

    @property
    def better(self) -> bool:
        """Wrong before, right now."""
        return self.after == self.label

    @property
    def worse(self) -> bool:
        """Right before, wrong now."""
        return self.before == self.label


@dataclass(frozen=True)
class Answers:
    """The answers of a network, and of the network that its training started from, on the images of a split.

    Attributes:
        class_names: names of the classes in the order of the labels.
        labels: true classes (N,), int64.
        after: answers of the network, (N,) int64.
        before: answers of the network that training started from, (N,) int64; ``None`` if it isn't known.
        changed: images with different answers: first those that became wrong, then those that became right,
            then those that are wrong both times; at most :data:`KEPT` of each.
    """

    class_names: Sequence[str]
    labels: Tensor
    after: Tensor
    before: Tensor | None
    changed: Sequence[ChangedImage] = ()

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def correct(self) -> int:
        """Number of images that the network has right."""
        return int((self.after == self.labels).sum())

    @property
    def correct_before(self) -> int | None:
        """Number of images that the first network has right; None if it isn't known."""
        return None if self.before is None else int((self.before == self.labels).sum())

    @property
    def changes(self) -> int | None:
        """Number of images with different answers; None if the first network isn't known."""
        return None if self.before is None else int((self.before != self.after).sum())

    @property
    def pairs(self) -> Pairs | None:
        """How many images became wrong and how many became right; None if the first network isn't known."""
        if self.before is None:
            return None
        was, now = self.before == self.labels, self.after == self.labels
        return Pairs(self.n, lost=int((was & ~now).sum()), gained=int((~was & now).sum()))

    def confusion(self) -> Tensor:
        """Confusion matrix of the network: counts (classes, classes) int64, a row for each true class."""
        classes = len(self.class_names)
        return torch.bincount(self.labels * classes + self.after, minlength=classes**2).view(classes, classes)

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """The ``most`` commonest errors: true class, answer, number of images; ties in class order."""
        counts = self.confusion().fill_diagonal_(0)
        found = [(row, column, int(counts[row, column])) for row, column in counts.nonzero().tolist()]
        return sorted(found, key=lambda item: (-item[2], item[0], item[1]))[:most]


def compare(
    after: Predict, before: Predict | None, split: Split, data: Data, device: torch.device | str = "cpu"
) -> Answers:
    """Classify every image of ``split`` by both networks, reading each image once.

    Args:
        after: the network.
        before: the network that its training started from, if it is known.
        split: images with labels.
        data: preprocessing and batch size.
        device: device of both networks.

    Raises:
        DataError: an image cannot be decoded.
    """
    now: list[Tensor] = []
    was: list[Tensor] = []
    kinds: dict[int, list[ChangedImage]] = {0: [], 1: [], 2: []}
    start = 0
    for images, labels in split.batches(data.eval_batch_size):
        found = images.to(device)
        now.append(after(input_for(after, found, data)).argmax(dim=1).cpu())
        if before is not None:
            was.append(before(input_for(before, found, data)).argmax(dim=1).cpu())
            for row in (now[-1] != was[-1]).nonzero().flatten().tolist():
                one = ChangedImage(
                    start + row, images[row].clone(), int(labels[row]), int(was[-1][row]), int(now[-1][row])
                )
                kept = kinds[0 if one.worse else 1 if one.better else 2]
                if len(kept) < KEPT:
                    kept.append(one)
        start += len(labels)
    changed = [one for kind in kinds.values() for one in kind]
    return Answers(
        split.class_names,
        split.labels,
        torch.cat(now),
        torch.cat(was) if before is not None else None,
        changed,
    )
