"""The CIFAR-10 test images in a folder beside the repository, for tests that want photographs."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qat.data import Split

PATH = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "test.parquet"
COUNT = 8000


class Photographs(Split):
    """RGB images in memory, uint8 (N, 3, 32, 32)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__([str(label) for label in range(10)], labels)
        self.images = images

    def fingerprint(self) -> str:
        raise NotImplementedError("no test asks for it")

    def _load(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in batches:
            yield self.images[indices], self.labels[indices]


@functools.cache
def cifar10(count: int = COUNT) -> Photographs:
    """The first ``count`` test images; skips the test where the folder is absent."""
    if not PATH.is_file():
        pytest.skip("no CIFAR-10 beside the repository")
    import pyarrow.parquet

    rows = next(pyarrow.parquet.ParquetFile(PATH).iter_batches(count))
    images = [Image.open(io.BytesIO(entry["bytes"])) for entry in rows["image"].to_pylist()]
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    labels = torch.tensor(rows["label"].to_pylist())
    return Photographs(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)
