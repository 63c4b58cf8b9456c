"""Flips, crops and translations of whole batches; further changes are in test_augment.py."""

from typing import Any

import pytest
import torch

from qat.data.augment import Augmenter
from tests.helpers.image_folders import augment

FULL: dict[str, Any] = {
    "flip": True,
    "translate": 0.1,
    "rotate": 10.0,
    "scale": (0.9, 1.1),
    "crop": (0.5, 1.0),
}


def noise(side: int = 20, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_nothing_configured_only_divides_by_255() -> None:
    images = noise(16)
    assert torch.equal(Augmenter(augment(), 16, seed=0)(images, 0, 0), images.float() / 255)


def test_augmented_batches_have_the_networks_size_and_range() -> None:
    result = Augmenter(augment(**FULL), 16, seed=0)(noise(), 0, 0)
    assert (result.shape, result.dtype) == ((4, 3, 16, 16), torch.float32)
    assert result.min() >= 0
    assert result.max() <= 1


def test_seed_epoch_and_step_alone_decide_the_result() -> None:
    augmenter = Augmenter(augment(**FULL), 16, seed=1)
    first = augmenter(noise(), 2, 3)
    augmenter(noise(), 2, 4)
    torch.rand(7)
    assert torch.equal(augmenter(noise(), 2, 3), first)
    assert torch.equal(Augmenter(augment(**FULL), 16, seed=1)(noise(), 2, 3), first)
    for seed, epoch, step in [(2, 2, 3), (1, 3, 3), (1, 2, 4)]:
        assert not torch.equal(Augmenter(augment(**FULL), 16, seed)(noise(), epoch, step), first)


def test_augmenting_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    Augmenter(augment(**FULL), 16, seed=1)(noise(), 0, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_flip_mirrors_some_images_and_leaves_the_others() -> None:
    images = noise(16, 32)
    result = Augmenter(augment(flip=True), 16, seed=0)(images, 0, 0)
    plain = images.float() / 255
    same = [torch.equal(a, b) for a, b in zip(result, plain, strict=True)]
    mirrored = [torch.equal(a, b) for a, b in zip(result, plain.flip(-1), strict=True)]
    assert all(s != m for s, m in zip(same, mirrored, strict=True))
    assert 8 <= sum(same) <= 24


def test_images_of_a_batch_get_different_crops() -> None:
    images = noise(20, 1).expand(4, -1, -1, -1)
    result = Augmenter(augment(crop=(0.3, 1.0)), 16, seed=0)(images, 0, 0)
    assert not torch.equal(result[0], result[1])


def test_translation_moves_by_at_most_its_share_and_fills_with_black() -> None:
    images = torch.zeros(16, 3, 20, 20, dtype=torch.uint8)
    images[:, :, 10, 10] = 255
    mass = Augmenter(augment(translate=0.1), 20, seed=0)(images, 0, 0)
    assert mass[:, :, 7:14, 7:14].sum() == pytest.approx(mass.sum().item())
    assert not torch.equal(mass[0], mass[1])
    white = torch.full((16, 3, 20, 20), 255, dtype=torch.uint8)
    assert Augmenter(augment(translate=0.1), 20, seed=0)(white, 0, 0).min() < 0.5


def test_images_of_another_size_or_type_are_refused() -> None:
    with pytest.raises(ValueError, match="no random crop"):
        Augmenter(augment(flip=True), 16, seed=0)(noise(20), 0, 0)
    with pytest.raises(ValueError, match="uint8"):
        Augmenter(augment(), 16, seed=0)(noise(16).float(), 0, 0)
