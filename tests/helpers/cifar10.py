"""The CIFAR-10 test images in a folder beside the repository, for tests that want photographs."""

from __future__ import annotations

import functools

import pytest

from qat.data.loading import load_split
from qat.data.split import MemorySplit
from qat.recipe.schema import Data
from tests.helpers.paths import ROOT

FOLDER = ROOT.parent / "shared" / "data" / "cifar10"
COUNT = 8000


class Photographs(MemorySplit):
    """RGB images in memory, uint8 (N, 3, 32, 32)."""


@functools.cache
def cifar10(count: int = COUNT) -> Photographs:
    """The first ``count`` test images; skips the test where the folder is absent."""
    if not (FOLDER / "test.parquet").is_file():
        pytest.skip("no CIFAR-10 beside the repository")
    split = load_split(Data(dataset="cifar10", root=str(FOLDER), image_size=32), "test")
    images, labels = next(split.batches(count))
    return Photographs(split.class_names, images, labels)
