"""Batches as users have them: what is taken as images, and a split made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.data.split import MemorySplit
from qat.errors import DataError


def images_of(batch: Any, number: int = 1) -> Tensor:
    """The images of a batch: a tensor (N, 3, H, W), or the first of a tuple or list such as (images, labels).

    Raises:
        DataError: it is something else; ``number`` says which batch.
    """
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"batch {number}: found {_named(images)}, allowed: images (N, 3, H, W)")
    return images


def normalized_images(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Any]]:
    """Normalized floating images (N, 3, H, W) of each batch, and the batch itself.

    Raises:
        DataError: a batch has no such images.
    """
    for number, batch in enumerate(batches, start=1):
        images = images_of(batch, number)
        if not images.is_floating_point():
            raise DataError(
                f"batch {number}: found {images.dtype} pixels, allowed: normalized images, "
                "(x / 255 - mean) / std of each channel"
            )
        yield images, batch


def labels_of(batch: Any, count: int, number: int = 1) -> Tensor:
    """The labels of a batch of ``count`` images: int64 (N,).

    Raises:
        DataError: it has none.
    """
    found = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    integers = isinstance(found, Tensor) and found.ndim == 1 and not found.is_floating_point()
    if not isinstance(found, Tensor) or not integers or len(found) != count:
        raise DataError(
            f"batch {number}: found {_named(found)} behind {count} images, allowed: {count} whole labels"
        )
    return found.long().cpu()


def split_of_batches(
    batches: Iterable[Any], side: int, class_names: Sequence[str] | None = None
) -> MemorySplit:
    """All images of ``batches``, kept in memory as uint8: a byte for each value.

    Args:
        batches: of (images, labels): pixels (N, 3, S, S) or (N, 1, S, S), uint8 or floats from 0 to 1, not
            normalized; labels (N,).
        side: S, in pixels.
        class_names: by label; by default the numbers up to the largest label.

    Raises:
        DataError: a batch holds something else, a label has no name, or there are no images.
    """
    pixels, labels = [], []
    for number, batch in enumerate(batches, start=1):
        images = images_of(batch, number).detach().cpu()
        if tuple(images.shape[2:]) != (side, side):
            raise DataError(
                f"batch {number}: images have {images.shape[2]}×{images.shape[3]} pixels, data.image_size is "
                f"{side}"
            )
        if images.is_floating_point():
            if not bool(((images >= 0) & (images <= 1)).all()):
                raise DataError(
                    f"batch {number}: pixels beyond 0 to 1; give pixels as they are, which the recipe's "
                    "data.mean and data.std normalize"
                )
            images = (255 * images).round()
        pixels.append(images.to(torch.uint8))
        labels.append(labels_of(batch, len(images), number))
    if not pixels or not sum(map(len, pixels)):
        raise DataError("no images: the batches are empty (an iterator can be read only once)")
    every = torch.cat(labels)
    names = list(class_names) if class_names is not None else [str(i) for i in range(int(every.max()) + 1)]
    if int(every.min()) < 0 or int(every.max()) >= len(names):
        raise DataError(f"labels run from {int(every.min())} to {int(every.max())}, classes are {len(names)}")
    return MemorySplit(names, torch.cat([one.expand(-1, 3, -1, -1) for one in pixels]), every)


def _named(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor {tuple(found.shape)} of {str(found.dtype).removeprefix('torch.')}"
    return "nothing" if found is None else type(found).__name__
