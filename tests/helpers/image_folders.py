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


def photographs(root: Path, train: int = 24, test: int = 8) -> Path:
    """``root/{train,validation}/CLASS/*.jpg``: JPEG files of many sizes, three classes.

    Each shows a disc in the colour of its class, somewhere before a background of smooth light, with noise.
    """
    colours = {"apple": (190, 40, 40), "leaf": (50, 150, 50), "sky": (60, 90, 200)}
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", test)):
        for name, colour in colours.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                width, height = random.integers(60, 110, 2)
                light = Image.fromarray(random.integers(60, 200, (4, 4, 3), dtype=np.uint8))
                pixels = np.asarray(light.resize((int(width), int(height)), Image.Resampling.BICUBIC)).copy()
                x, y = random.uniform(0.4, 0.6, 2) * (width, height)
                rows, columns = np.mgrid[:height, :width]
                disc = np.hypot(columns - x, rows - y) < 0.36 * min(width, height)
                pixels[disc] = pixels[disc] // 4 + np.array(colour) * 3 // 4
                noisy = (pixels + random.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(root / split / name / f"IMG_{number:04}.jpg", quality=85)
    return root
