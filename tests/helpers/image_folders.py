"""Small data sets for recipes: the digits, and folders of images."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qat.data.split import MemorySplit, Split
from qat.recipe.schema import Augment, Data

BASE: dict[str, Any] = {
    "root": None,
    "image_size": 16,
    "resize": None,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "batch_size": 4,
    "eval_batch_size": 4,
    "workers": 0,
    "train_split": "train",
    "test_split": "test",
}
NO_AUGMENT: dict[str, Any] = {"flip": False, "translate": 0.0, "rotate": 0.0, "scale": None, "crop": None}


def augment(**changes: Any) -> Augment:
    return Augment(**(NO_AUGMENT | changes))


def folder(root: Path | None, **changes: Any) -> Data:
    settings = {**BASE, "dataset": "imagefolder", "root": root and str(root), "augment": augment()}
    return Data(**(settings | changes))


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def make_tree(root: Path, **splits: dict[str, int]) -> Path:
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                write_image(root / split / name / f"{i}.png", seed=zlib.crc32(f"{split}/{name}/{i}".encode()))
    return root


def everything(split: Split, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*split.batches(4, **options), strict=True)
    return torch.cat(images), torch.cat(labels)


def small_split(count: int = 10) -> MemorySplit:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return MemorySplit(["even", "odd"], images, torch.arange(count) % 2)
