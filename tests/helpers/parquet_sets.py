"""Tiny image data sets as Parquet files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from qat.data.loading import load_split
from qat.data.split import Split
from qat.errors import DataError
from qat.recipe.schema import Data

CLASSES = ["cat", "dog", "emu"]
LABELS = [0, 1, 2, 0, 1, 2, 2]


def encoded(seed: int, size: tuple[int, int] = (24, 20), kind: str = "PNG") -> bytes:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write(
    path: Path,
    labels: Sequence[int | None],
    *,
    seed: int = 0,
    names: Sequence[str] | None = CLASSES,
    images: Sequence[bytes | None] | None = None,
    image: str = "image",
    label: str = "label",
    size: tuple[int, int] = (24, 20),
) -> Path:
    """Rows with these labels as a Parquet file; images are by default noise. Nothing is checked."""
    found = images if images is not None else [encoded(seed + i, size) for i in range(len(labels))]
    kind = datasets.ClassLabel(names=list(names)) if names is not None else datasets.Value("int64")
    schema = datasets.Features({image: datasets.Image(), label: kind}).arrow_schema
    cells = [{"bytes": one, "path": None} for one in found]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: cells, label: list(labels)}, schema=schema), path)
    return path


def settings(root: Path | None, **changes: Any) -> Data:
    base = {"dataset": "parquet", "root": root and str(root), "image_size": 16, "test_split": "test"}
    return Data(**(base | changes))


def everything(split: Split, **options: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*split.batches(3, **options), strict=True)
    return torch.cat(images), torch.cat(labels)


def refusal(data: Data, name: Any = "train") -> str:
    with pytest.raises(DataError) as caught:
        everything(load_split(data, name))
    return str(caught.value)
