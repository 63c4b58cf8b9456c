"""Splits in memory: the order and number of their batches, and their fingerprint."""

import pytest
import torch

from qat.data.split import MemorySplit
from tests.helpers.image_folders import everything, small_split


def test_the_order_without_a_seed_is_the_splits_own() -> None:
    images, labels = everything(small_split())
    assert images[:, 0, 0, 0].tolist() == list(range(10))
    assert labels.tolist() == [0, 1] * 5


def test_images_in_memory_have_no_names() -> None:
    assert small_split().image_name(0) is None


def test_a_seed_alone_decides_the_order() -> None:
    first, labels = everything(small_split(), shuffle_seed=3)
    torch.rand(5)
    again, _ = everything(small_split(), shuffle_seed=3)
    other, _ = everything(small_split(), shuffle_seed=4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sorted(first[:, 0, 0, 0].tolist()) == list(range(10))
    assert torch.equal(first[:, 0, 0, 0] % 2, labels)


@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_skipped_batches_are_the_first_and_the_others_stay_as_they_are(skip: int) -> None:
    every = list(small_split().batches(4, shuffle_seed=3))
    left = list(small_split().batches(4, shuffle_seed=3, skip=skip))
    assert len(left) == len(every) - skip
    for (images, labels), (others, other_labels) in zip(left, every[skip:], strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("count", [3, 8, 10])
def test_batch_count_is_the_number_of_batches(count: int, drop_last: bool) -> None:
    batches = list(small_split(count).batches(4, drop_last=drop_last))
    assert len(batches) == small_split(count).batch_count(4, drop_last)
    if drop_last:
        assert all(len(images) == 4 for images, _ in batches)
    else:
        assert sum(len(images) for images, _ in batches) == count


def test_a_fingerprint_changes_with_a_pixel_a_label_and_the_order() -> None:
    split = small_split()
    pixel = split.images.clone()
    pixel[4] += 1
    variants = [
        split,
        MemorySplit(split.class_names, pixel, split.labels),
        MemorySplit(split.class_names, split.images, 1 - split.labels),
        MemorySplit(split.class_names, split.images.flip(0), split.labels.flip(0)),
    ]
    assert len({variant.fingerprint() for variant in variants}) == 4
    assert small_split().fingerprint() == split.fingerprint() == split.content_fingerprint()
