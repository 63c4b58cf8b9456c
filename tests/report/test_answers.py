"""What two networks answer: counts, confusions, and which images are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.data.split import MemorySplit
from qat.recipe.schema import Data
from qat.report.answers import KEPT, compare
from tests.helpers.reports import answers

#: Grey images whose first pixel is their class, which `reads` answers.
NAMES = ("a", "b", "c")


def split(labels: list[int], pixels: list[int]) -> MemorySplit:
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 2, 2)
    return MemorySplit(NAMES, images, torch.tensor(labels))


def reads(images: Tensor) -> Tensor:
    """The class that the first pixel names."""
    return torch.eye(3)[(images[:, 0, 0, 0] * 255).round().long()]


def always(label: int) -> object:
    return lambda images: torch.eye(3)[label].expand(len(images), 3)


DATA = Data(eval_batch_size=2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_both_networks_are_asked_about_every_image() -> None:
    found = compare(reads, always(1), split([0, 1, 2, 1, 0], [0, 1, 1, 2, 2]), DATA)  # type: ignore[arg-type]
    assert found.after.tolist() == [0, 1, 1, 2, 2]
    assert found.before is not None
    assert found.before.tolist() == [1] * 5
    assert (found.n, found.correct, found.correct_before, found.changes) == (5, 2, 2, 3)
    assert found.pairs is not None
    assert (found.pairs.lost, found.pairs.gained) == (1, 1)


def test_changed_images_come_worst_first_with_their_pixels() -> None:
    found = compare(reads, always(1), split([0, 1, 2, 1, 0], [0, 1, 1, 2, 2]), DATA)  # type: ignore[arg-type]
    assert [(one.index, one.worse, one.better) for one in found.changed] == [
        (3, True, False),
        (0, False, True),
        (4, False, False),
    ]
    assert [int(one.pixels[0, 0, 0]) for one in found.changed] == [2, 0, 2]
    assert [(one.label, one.before, one.after) for one in found.changed] == [(1, 1, 2), (0, 1, 0), (0, 1, 2)]
    assert found.changed[0].pixels.shape == (3, 2, 2)
    assert found.changed[0].pixels.dtype == torch.uint8


def test_no_more_images_are_kept_than_can_be_shown() -> None:
    many = split([1] * 200, [2] * 200)
    found = compare(reads, always(1), many, DATA)  # type: ignore[arg-type]
    assert len(found.changed) == KEPT
    assert found.changes == 200


def test_without_the_first_network_there_is_no_comparison() -> None:
    found = compare(reads, None, split([0, 1], [0, 2]), DATA)
    assert found.correct == 1
    assert (found.before, found.correct_before, found.changes, found.pairs) == (None, None, None, None)
    assert list(found.changed) == []


def test_rows_of_the_confusion_matrix_are_true_classes() -> None:
    found = answers([0, 0, 1, 2, 2, 2], [0, 1, 1, 0, 0, 2], names=NAMES)
    assert found.confusion().tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    assert found.confused(5) == [(2, 0, 2), (0, 1, 1)]
    assert found.confused(1) == [(2, 0, 2)]
    assert answers([0], [0], names=NAMES).confused(5) == []
