"""Loads the data set that a recipe names.

It is one of scikit-learn's digits, which need no download; folders ``ROOT/SPLIT/CLASS/image``
(:mod:`qat.data.folder`); Parquet files, CIFAR-10 among them (:mod:`qat.data.parquet`); or a data set of the
Hugging Face Hub (:mod:`qat.data.hub`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from qat.data.folder import FolderSplit, folder_layout, load_folder_split
from qat.data.hub import load_hub_split
from qat.data.parquet import load_parquet_split, parquet_layout
from qat.data.paths import cifar10_folder, found_root
from qat.data.problems import Problem, refusal
from qat.data.split import MemorySplit, Split, SplitName
from qat.errors import DataError
from qat.recipe.schema import Data

__all__ = ["Loaded", "check_fits", "load_every", "load_for_training", "load_split", "load_splits"]

DIGITS_TEST_IMAGES = 360
DIGITS_SPLIT_SEED = 0  # fixed, so that accuracies on digits are comparable across runs and recipes


def load_splits(data: Data) -> tuple[Split, Split]:
    """Load the training and the test split.

    Raises:
        DataError: see :func:`load_split`.
    """
    return load_split(data, "train"), load_split(data, "test")


class Loaded(NamedTuple):
    """The splits of a data set; ``final`` where there is one."""

    train: Split
    test: Split
    final: Split | None

    @property
    def every(self) -> list[Split]:
        """Those that there are."""
        return [split for split in self if split is not None]


def load_for_training(data: Data) -> Loaded:
    """Load all splits of ``data``, after a look at the names, links and headers of their files.

    Raises:
        DataError: as :func:`load_split` does; files that cannot be used are told of all splits at once.
    """
    problems: list[Problem] | None = [] if data.on_error == "stop" else None
    loaded = load_every(data, problems)
    if problems is not None:
        for split in loaded.every:
            if isinstance(split, FolderSplit):
                problems += split.header_problems()
        if problems:
            raise refusal(list(dict.fromkeys(problems)), found_root(data))
    return loaded


def load_every(data: Data, problems: list[Problem] | None = None) -> Loaded:
    """Load all splits of ``data``; see :func:`load_split`."""
    train, test = load_split(data, "train", problems), load_split(data, "test", problems)
    return Loaded(train, test, load_split(data, "final", problems) if _final_name(data) else None)


def _final_name(data: Data) -> str | None:
    """What the split of the last figure is called; ``None`` where there is none but the other two.

    Raises:
        DataError: the splits cannot be told.
    """
    if data.dataset == "imagefolder":
        return folder_layout(data, found_root(data)).final
    folder = cifar10_folder(data) if data.dataset == "cifar10" else None
    if data.dataset == "parquet" or folder is not None:
        return parquet_layout(data, folder or found_root(data)).final
    return data.final_split if data.final_split != data.evaluated_split else None


def load_split(data: Data, name: SplitName, problems: list[Problem] | None = None) -> Split:
    """Load one split of ``data``. The images of the other split are not read.

    Images are squares of ``data.image_size`` pixels. There is one exception: training images with
    ``data.augment.crop`` are squares of ``data.shorter_side`` pixels (except digits), because a random crop
    needs a larger image to cut from. Load with ``augment.crop`` unset to get training images as an evaluation
    sees them.

    Args:
        data: where the images are, and how they are preprocessed.
        name: which split.
        problems: takes the files that can't be used, which are an error without it, or left out with
            ``data.on_error`` 'skip'.

    Raises:
        DataError: the folder, the split or the images of a class are missing, files can't be used, or the
            classes of ``data.train_split`` and ``data.evaluated_split`` differ.
    """
    if data.dataset == "digits":
        train, test = _digits(data.image_size)
        return train if name == "train" else test
    if data.shorter_side < data.image_size:
        raise DataError(f"data.resize: {data.resize} is smaller than data.image_size, {data.image_size}")
    if data.dataset == "imagefolder":
        return load_folder_split(data, name, problems)
    if data.dataset == "parquet":
        return load_parquet_split(data, found_root(data), name, problems)
    folder = cifar10_folder(data) if data.dataset == "cifar10" else None
    if folder is None:
        return load_hub_split(data, name, problems)
    return load_parquet_split(data, folder, name, problems)


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
