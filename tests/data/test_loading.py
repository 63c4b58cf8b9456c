"""Loading scikit-learn's digits, and refusing networks that don't fit the data."""

from typing import Any

import pytest
import torch

from qat.data.loading import check_fits, load_split, load_splits
from qat.errors import DataError
from qat.recipe.schema import Data
from tests.helpers.image_folders import BASE, augment, everything, small_split


def digits(**changes: Any) -> Data:
    return Data(**({**BASE, "dataset": "digits", "augment": augment()} | changes))


def test_digits_are_1437_training_and_360_stratified_test_images() -> None:
    train, test = load_splits(digits())
    assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
    assert train.class_names == [str(i) for i in range(10)]
    _, labels = everything(test)
    assert labels.bincount().min() >= 34
    assert labels.bincount().max() <= 38


def test_digits_arrive_as_uint8_with_three_equal_channels_and_the_full_range() -> None:
    images, labels = next(load_split(digits(image_size=8), "test").batches(360))
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.shape == (360, 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])
    assert (images.min(), images.max()) == (0, 255)
    assert set(images.unique().tolist()) <= {round(v * 255 / 16) for v in range(17)}


def test_training_and_test_digits_do_not_share_an_image() -> None:
    train, test = load_splits(digits(image_size=8))
    seen = {image.numpy().tobytes() for image in everything(train)[0]}
    assert not seen & {image.numpy().tobytes() for image in everything(test)[0]}


def test_digits_of_one_size_are_made_once() -> None:
    assert load_split(digits(), "test") is load_split(digits(), "test")
    assert load_split(digits(), "test") is not load_split(digits(image_size=8), "test")


def test_a_network_with_other_classes_than_the_data_is_refused() -> None:
    check_fits(small_split(), 2)
    with pytest.raises(DataError, match="the data has 2 classes, the network 1000"):
        check_fits(small_split(), 1000)
