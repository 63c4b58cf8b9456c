"""Loads the data set that a recipe names.

It is one of scikit-learn's digits, which need no download; folders ``ROOT/SPLIT/CLASS/image``
(:mod:`qat.data.folder`); Parquet files, CIFAR-10 among them (:mod:`qat.data.parquet`); or a data set of the
Hugging Face Hub (:mod:`qat.data.hub`).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image

from qat.data.folder import load_folder_split
from qat.data.hub import load_hub_split
from qat.data.parquet import load_parquet_split
from qat.data.paths import cifar10_folder, found_root
from qat.data.split import MemorySplit, Split, SplitName
from qat.errors import DataError
from qat.recipe.schema import Data

__all__ = ["check_fits", "load_split", "load_splits"]

DIGITS_TEST_IMAGES = 360
DIGITS_SPLIT_SEED = 0  # fixed, so that accuracies on digits are comparable across runs and recipes


def load_splits(data: Data) -> tuple[Split, Split]:
    """Load the training and the test split.

    Raises:
        DataError: see :func:`load_split`.
    """
    return load_split(data, "train"), load_split(data, "test")


def load_split(data: Data, name: SplitName) -> Split:
    """Load one split of ``data``. The images of the other split are not read.

    Images are squares of ``data.image_size`` pixels. There is one exception: training images with
    ``data.augment.crop`` are squares of ``data.shorter_side`` pixels (except digits), because a random crop
    needs a larger image to cut from. Load with ``augment.crop`` unset to get training images as an evaluation
    sees them.

    Raises:
        DataError: the folder, the split or the images of a class are missing, or the classes of
            ``data.train_split`` and ``data.evaluated_split`` differ.
    """
    if data.dataset == "digits":
        train, test = _digits(data.image_size)
        return train if name == "train" else test
    if data.shorter_side < data.image_size:
        raise DataError(f"data.resize: {data.resize} is smaller than data.image_size, {data.image_size}")
    if data.dataset == "imagefolder":
        return load_folder_split(data, name)
    if data.dataset == "parquet":
        return load_parquet_split(data, found_root(data), name)
    folder = cifar10_folder(data) if data.dataset == "cifar10" else None
    if folder is None:
        return load_hub_split(data, name)
    return load_parquet_split(data, folder, name)


@functools.lru_cache(maxsize=4)
def _digits(image_size: int) -> tuple[Split, Split]:
    """Training and test split of scikit-learn's 1797 digits.

    The digits are 8×8 pixels in 0 to 16. They are scaled to 0 to 255, and resized to ``image_size``.
    """
    from sklearn.datasets import load_digits  # imported here: it takes a second
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    size = (image_size, image_size)
    images = np.stack(
        [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in small]
    )
    train, test = train_test_split(
        np.arange(len(images)),
        test_size=DIGITS_TEST_IMAGES,
        stratify=digits.target,
        random_state=DIGITS_SPLIT_SEED,
    )
    names = [str(digit) for digit in digits.target_names]

    def split(indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Split:
        labels = torch.from_numpy(digits.target[indices]).long()
        return MemorySplit(names, torch.from_numpy(images[indices]).unsqueeze(1), labels)

    return split(train), split(test)


def check_fits(split: Split, num_classes: int) -> None:
    """Check that the network has as many classes as the data.

    Raises:
        DataError: ``split`` has another number of classes than ``num_classes``.
    """
    if split.num_classes != num_classes:
        raise DataError(f"the data has {split.num_classes} classes, the network {num_classes}")
