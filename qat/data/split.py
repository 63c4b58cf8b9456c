"""The interface of every data set: labelled uint8 images in a fixed order, yielded in batches."""

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

#: What a split is for: training, choosing epochs, or the last figure of a run.
SplitName = Literal["train", "test", "final"]

#: Images that :meth:`Split.evenly` loads at a time.
_LOADED_AT_ONCE: Final = 64


class Split(ABC):
    """N labelled images in a fixed order.

    Attributes:
        class_names: name of each class, by label.
        resize: length in pixels to which the shorter side of an image is resized before its centre is
            cropped; ``None`` if that isn't done.
        share: the part of each batch that is yielded. Several processes, each with a share of its own, have
            the same batches in the same order, and load a part of each batch.
        name: name of the split in results; ``None`` where nothing but the recipe says it.
        notes: sentences for the user on which images were chosen.
        left_out: which images were left out, in words; ``None`` where all are here.
    """

    resize: int | None = None
    share: Share = WHOLE
    name: str | None = None
    notes: Sequence[str] = ()
    left_out: str | None = None

    def __init__(self, class_names: Sequence[str], labels: Tensor) -> None:
        """Take the class names in label order, and the labels, int64 (N,)."""
        self.class_names = list(class_names)
        self._labels = labels

    @property
    def labels(self) -> Tensor:
        """The labels in the split's order, int64 (N,)."""
        return self._labels

    def image_name(self, index: int) -> str | None:
        """What the image at ``index`` is called, without folders of this machine; ``None`` without a name."""
        return None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def batch_count(self, batch_size: int, drop_last: bool = False) -> int:
        """Number of batches that :meth:`batches` yields; 0 with ``drop_last`` if there are too few images."""
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        drop_last: bool = False,
        skip: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches: uint8 images (n, 3, H, W) and int64 labels (n,).

        With a ``share``, each is a part of a batch, which may be empty. The global random state stays as it
        is.

        Args:
            batch_size: images of a batch.
            shuffle_seed: seed of a random order, which depends on nothing else; ``None`` keeps the split's
                own order.
            drop_last: whether to leave out a last batch that has fewer images.
            skip: number of batches at the start that are left out without being loaded.

        Raises:
            DataError: an image can't be decoded; the message names it.
        """
        sizes = [
            min(batch_size, len(self) - number * batch_size)
            for number in range(self.batch_count(batch_size, drop_last))
        ]
        return self._batches(shuffle_seed, sum(sizes[:skip]), sizes[skip:])

    def _batches(
        self, shuffle_seed: int | None, passed: int, sizes: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of the given sizes, after ``passed`` images in the order of ``shuffle_seed``."""
        if shuffle_seed is None:
            order = torch.arange(len(self))
        else:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(shuffle_seed))
        batches = list(torch.split(order[passed : passed + sum(sizes)], list(sizes)))
        return self._load(batches) if self.share == WHOLE else self._load_share(batches)

    def _load_share(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's part of each batch."""
        parts = [indices[self.share.of(len(indices))] for indices in batches]
        loaded = self._load([part for part in parts if len(part)])
        for indices, part in zip(batches, parts, strict=True):
            if len(part):
                yield next(loaded)
            else:
                # An empty part, (0, 3, H, W), takes its height and width from an image that is loaded for it.
                for images, labels in self._load([indices[:1]]):
                    yield images[:0], labels[:0]

    def evenly(self, count: int) -> tuple[Tensor, Tensor]:
        """Images at even distances over the split, so that all classes occur if it is sorted by class.

        Args:
            count: number of images, from 1 to that of the split.

        Returns:
            uint8 images (count, 3, H, W) and int64 labels (count,), in the split's order.
        """
        order = torch.arange(count) * len(self) // count
        batches = [order[i : i + _LOADED_AT_ONCE] for i in range(0, count, _LOADED_AT_ONCE)]
        images, labels = zip(*self._load(batches), strict=True)
        return torch.cat(images), torch.cat(labels)

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal digits, that changes when an image, a label or the order changes."""

    def content_fingerprint(self) -> str:
        """SHA-256, in hexadecimal digits, of the images and labels in order, but not of file names.

        It reads every image. If :meth:`fingerprint` reads every image, too, both are equal.
        """
        return self.fingerprint()

    @abstractmethod
    def _load(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a batch of images and labels for each tensor of indices, int64 (n,)."""


class MemorySplit(Split):
    """Images that are held in memory.

    Attributes:
        images: uint8 (N, 3, H, W), or (N, 1, H, W), which is yielded with three equal channels.
    """

    def __init__(self, class_names: Sequence[str], images: Tensor, labels: Tensor) -> None:
        """Take the class names in label order, the images, and the labels, int64 (N,)."""
        super().__init__(class_names, labels)
        self.images = images

    def fingerprint(self) -> str:
        """SHA-256 over shape, pixels and labels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def _load(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in batches:
            images = self.images[indices]
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
