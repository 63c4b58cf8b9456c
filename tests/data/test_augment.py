"""Random changes to whole batches. Flips, crops and translations are tested in test_augmented_batches.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qat.data.augment import Augmenter, shifted
from qat.recipe.schema import Augment, RandAugment
from qat.system.launch import Share
from tests.helpers.joined_processes import call

CHANGES: list[dict[str, Any]] = [
    {"pad": 3},
    {"randaugment": RandAugment(count=2, magnitude=7)},
    {"jitter": 0.4},
    {"erasing": 1.0},
]
ALL: dict[str, Any] = {key: value for change in CHANGES for key, value in change.items()}


def noise(count: int = 16, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("change", [*CHANGES, ALL], ids=lambda change: "-".join(change))
def test_seed_epoch_and_step_alone_decide_each_change(change: dict[str, Any]) -> None:
    images = noise()
    augmenter = Augmenter(Augment(**change), 16, seed=1)
    before = torch.get_rng_state()
    first = augmenter(images, 2, 3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    augmenter(images, 2, 4)
    assert torch.equal(augmenter(images, 2, 3), first)
    for seed, epoch, step in [(2, 2, 3), (1, 3, 3), (1, 2, 4)]:
        assert not torch.equal(Augmenter(Augment(**change), 16, seed)(images, epoch, step), first)
    assert not torch.equal(first, images / 255)
    assert (first.shape, first.dtype) == (images.shape, torch.float32)
    assert 0 <= first.min() <= first.max() <= 1


def _changed() -> torch.Tensor:
    return Augmenter(Augment(**ALL), 16, seed=1)(noise(), 2, 3)


def test_a_process_of_its_own_makes_the_same_pixels() -> None:
    (again,) = call(_changed, size=1)
    torch.rand(3)
    assert torch.equal(again, _changed())


def test_a_shift_moves_whole_pixels_by_up_to_its_number_and_fills_with_black() -> None:
    images = noise(400, 5).float() + 1  # no pixel is black before the change
    torch.manual_seed(0)
    moved = shifted(images, 2)
    found = set()
    for before, after in zip(images, moved, strict=True):
        padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
        places = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(padded[:, top : top + 5, left : left + 5], after)
        ]
        assert len(places) == 1
        found |= set(places)
    assert len(found) == 25  # every shift occurs along both axes


def test_images_of_a_batch_get_different_changes() -> None:
    one = noise(1).expand(16, -1, -1, -1)
    result = Augmenter(Augment(randaugment=RandAugment()), 16, seed=0)(one, 0, 0)
    kinds = {tuple(image.flatten().tolist()) for image in result}
    assert len(kinds) >= 8  # each eighth of the batch has its own changes


def test_erasing_makes_one_rectangle_black_and_spares_some_images() -> None:
    white = torch.full((64, 3, 16, 16), 255, dtype=torch.uint8)
    result = Augmenter(Augment(erasing=0.5), 16, seed=0)(white, 0, 0)
    spared = [bool((image == 1).all()) for image in result]
    assert 16 <= sum(spared) <= 48
    for image in (image for image, whole in zip(result, spared, strict=True) if not whole):
        rows, columns = (image[0] == 0).any(1), (image[0] == 0).any(0)
        assert (image[:, rows][:, :, columns] == 0).all()
        assert int((image[0] == 0).sum()) == int(rows.sum()) * int(columns.sum())


PARTS: list[dict[str, Any]] = [
    *CHANGES,
    {"flip": True},
    {"translate": 0.2, "rotate": 10.0, "scale": (0.8, 1.2)},
    {"crop": (0.3, 1.0)},
    ALL | {"flip": True, "crop": (0.3, 1.0), "translate": 0.2, "erasing": 0.5},
]


@pytest.mark.parametrize("size", [2, 3, 12])
@pytest.mark.parametrize("change", PARTS, ids=lambda change: "-".join(change))
def test_a_part_of_a_batch_is_changed_as_beside_the_others(change: dict[str, Any], size: int) -> None:
    """RandAugment changes two of the twelve images at a time, so that some parts split such a pair."""
    images = noise(12)
    augmenter = Augmenter(Augment(**change), 16, seed=1)
    for step in range(3):
        whole = augmenter(images, 2, step)
        shares = [Share(rank, size) for rank in range(size)]
        parts = [augmenter(images[share.of(12)], 2, step, share) for share in shares]
        assert torch.equal(torch.cat(parts), whole)
