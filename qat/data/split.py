"""What every data set is here: labelled uint8 images in a fixed order, yielded in batches."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.system.launch import WHOLE, Share

__all__ = ["MemorySplit", "NoiseSplit", "Split", "SplitName"]

SplitName = Literal["train", "test"]

#: Images of one batch where all are kept in memory anyway.
_LOADED_AT_ONCE: Final = 64


class Split(ABC):
    """Labelled images in a fixed order. ``class_names[label]`` names a label.

    ``resize`` is the length in pixels that the shorter side of an image was brought to before its centre was
    cut out; ``None`` where that is not done. ``share`` is the part of each batch that is loaded, where others
    load the rest: order, number and composition of the batches stay.
    """

    resize: int | None = None
    share: Share = WHOLE

    def __init__(self, class_names: Sequence[str], labels: Tensor) -> None:
        """Take the class names in label order and the int64 labels (N,)."""
        self.class_names = list(class_names)
        self._labels = labels

    @property
    def labels(self) -> Tensor:
        """int64 (N,), in the split's order."""
        return self._labels

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def batch_count(self, batch_size: int, drop_last: bool = False) -> int:
        """Number of batches ``batches`` yields; 0 if ``drop_last`` and there are too few images for one."""
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        drop_last: bool = False,
        skip: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 images (N, 3, H, W) and int64 labels (N,).

        The order is the split's own, or with ``shuffle_seed`` a permutation that depends on that seed
        alone. The first ``skip`` batches are left out without being loaded. The global random state is
        untouched. Of each batch this is the part that ``share`` says, which may be empty.
        Raises ``DataError`` naming an image it cannot decode.
        """
        sizes = [
            min(batch_size, len(self) - number * batch_size)
            for number in range(self.batch_count(batch_size, drop_last))
        ]
        return self._batches(shuffle_seed, sum(sizes[:skip]), sizes[skip:])

    def _batches(
        self, shuffle_seed: int | None, passed: int, sizes: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of ``sizes`` of the images behind the first ``passed`` in the order of ``shuffle_seed``."""
        if shuffle_seed is None:
            order = torch.arange(len(self))
        else:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(shuffle_seed))
        batches = list(torch.split(order[passed : passed + sum(sizes)], list(sizes)))
        return self._load(batches) if self.share == WHOLE else self._load_share(batches)

    def _load_share(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        parts = [indices[self.share.of(len(indices))] for indices in batches]
        loaded = self._load([part for part in parts if len(part)])
        for indices, part in zip(batches, parts, strict=True):
            if len(part):
                yield next(loaded)
            else:  # no image, but of the size that the others have
                for images, labels in self._load([indices[:1]]):
                    yield images[:0], labels[:0]

    def evenly(self, count: int) -> tuple[Tensor, Tensor]:
        """uint8 images (count, 3, H, W) and labels (count,), evenly spaced over the split, in its order.

        Folders are sorted by class: the first images would be of a few classes. ``count`` is 1 to the
        number of images.
        """
        order = torch.arange(count) * len(self) // count
        batches = [order[i : i + _LOADED_AT_ONCE] for i in range(0, count, _LOADED_AT_ONCE)]
        images, labels = zip(*self._load(batches), strict=True)
        return torch.cat(images), torch.cat(labels)

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 that changes when an image, a label or the order does."""

    def content_fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the images and labels in order, whatever the files are called.

        It reads every image. Where :meth:`fingerprint` does that, too, they are the same.
        """
        return self.fingerprint()

    @abstractmethod
    def _load(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels at each of the index tensors."""


class MemorySplit(Split):
    """Images in memory as uint8 (N, 3, H, W), or (N, 1, H, W): yielded with three equal channels."""

    def __init__(self, class_names: Sequence[str], images: Tensor, labels: Tensor) -> None:
        """Take the class names, the images and the int64 labels (N,)."""
        super().__init__(class_names, labels)
        self._images = images

    def fingerprint(self) -> str:
        """SHA-256 over shape, pixels and labels."""
        digest = hashlib.sha256(repr(tuple(self._images.shape)).encode())
        digest.update(self._images.numpy().tobytes())
        digest.update(self.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def _load(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in batches:
            images = self._images[indices]
            yield images.expand(-1, 3, -1, -1).contiguous(), self.labels[indices]


class NoiseSplit(MemorySplit):
    """Images of noise without a true class, always the same, for comparing two forms of one network.

    Half of them are smooth, as photographs are: plain noise alone reaches few of the values of deep layers.
    """

    def __init__(self, class_names: Sequence[str], side: int, count: int = 64) -> None:
        """Draw ``count`` images, an even number, of ``side`` × ``side`` pixels."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count // 2, 3, 4, 4, generator=generator)
        smooth = F.interpolate(coarse, side, mode="bilinear", align_corners=False)
        pixels = torch.cat([smooth, torch.rand(count // 2, 3, side, side, generator=generator)])
        labels = torch.zeros(count, dtype=torch.int64)
        super().__init__(class_names, (255 * pixels).round().to(torch.uint8), labels)
