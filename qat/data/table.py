"""Encoded images in a table as a data set, decoded batch by batch, and kept in memory if they are few."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat.data.columns import TableImages
from qat.data.decode import content_hash, decoded_batches
from qat.data.prefetch import prefetched
from qat.data.probing import probe
from qat.data.problems import counted
from qat.data.split import Split
from qat.errors import DataError

__all__ = ["TableSplit", "without_broken"]

#: Most bytes of decoded images that are kept in memory unless the recipe says otherwise. Also the most bytes
#: of encoded images that :meth:`TableSplit.fingerprint` reads.
IN_MEMORY_BYTES: Final = 2**30


class TableSplit(Split):
    """Images of a table, in its order."""

    resize: int

    def __init__(
        self,
        images: TableImages,
        class_names: Sequence[str],
        labels: Tensor,
        *,
        resize: int,
        side: int,
        workers: int = 0,
        in_memory: bool | None = None,
        turn: bool = False,
    ) -> None:
        """Make a split of a table's images.

        Args:
            images: the encoded images.
            class_names: names of the classes in label order.
            labels: int64 (N,).
            resize, side, turn: see :func:`qat.data.decode.decode`.
            workers: number of processes that decode; 0 decodes in a thread.
            in_memory: whether decoded images are kept in memory; ``None`` keeps them if they take at most 1
                GiB.
        """
        super().__init__(class_names, labels)
        self.resize = resize
        self.side = side
        self.workers = workers
        self.turn = turn
        self.encoded = images
        self._kept = len(labels) * 3 * side**2 <= IN_MEMORY_BYTES if in_memory is None else in_memory

    def image_name(self, index: int) -> str:
        """The file or data set, and the row in it."""
        return Path(self.encoded.name(index)).name

    def fingerprint(self) -> str:
        """SHA-256 over sizes and labels if the encoded images take more than 1 GiB, else over their content.

        The content's is :meth:`content_fingerprint`.

        Raises:
            DataError: an image is missing.
        """
        return self._fingerprint

    def content_fingerprint(self) -> str:
        """The hash of :func:`qat.data.decode.content_hash`, which is the same for the same images as files.

        Raises:
            DataError: an image is missing.
        """
        return self._content_fingerprint

    @functools.cached_property
    def _content_fingerprint(self) -> str:
        return content_hash(self.encoded, self.labels)

    @functools.cached_property
    def _fingerprint(self) -> str:
        sizes = [
            size if size is not None else self._size(row) for row, size in enumerate(self.encoded.sizes())
        ]
        if sum(sizes) <= IN_MEMORY_BYTES:
            return self._content_fingerprint
        digest = hashlib.sha256()
        for size, label in zip(sizes, self.labels.tolist(), strict=True):
            digest.update(f"{size}\0{label}\n".encode())
        return digest.hexdigest()

    def _size(self, row: int) -> int:
        source = self.encoded.image(row)
        try:
            return source.stat().st_size if isinstance(source, Path) else len(source)
        except OSError as error:
            raise DataError(
                f"{self.encoded.name(row)}: cannot be read: {error.strerror}: {error.filename}"
            ) from error

    def _load(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if not self._kept:
            return self._decoded(batches)
        missing = [indices[~self._known[indices]] for indices in batches]
        return self._completed(
            batches, missing, self._decoded([indices for indices in missing if len(indices)])
        )

    def _decoded(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loaded = decoded_batches(
            self.encoded,
            self.labels,
            batches,
            resize=self.resize,
            side=self.side,
            workers=self.workers,
            turn=self.turn,
        )
        return loaded if self.workers else prefetched(loaded)

    def _completed(
        self, batches: list[Tensor], missing: list[Tensor], decoded: Iterator[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images at ``batches``. Those at ``missing`` are taken from ``decoded`` and kept."""
        for indices, absent in zip(batches, missing, strict=True):
            if len(absent):
                images, _ = next(decoded)
                self._pixels[absent.numpy()] = images.numpy()
                self._known[absent] = True
            yield torch.from_numpy(self._pixels[indices.numpy()]), self.labels[indices]

    @functools.cached_property
    def _pixels(self) -> NDArray[np.uint8]:
        """Decoded images, uint8 (N, 3, side, side). An image that isn't known yet is uninitialized memory."""
        return np.empty((len(self), 3, self.side, self.side), np.uint8)

    @functools.cached_property
    def _known(self) -> Tensor:
        """Whether each image was decoded already, bool (N,)."""
        return torch.zeros(len(self), dtype=torch.bool)


def without_broken(
    images: TableImages, labels: Tensor, turn: bool, called: str
) -> tuple[TableImages, Tensor, str | None]:
    """The images (N) and labels (N,) that can be decoded, and in words which others there were.

    Raises:
        DataError: none can.
    """
    bad = probe(images, range(len(images)), turn=turn)
    if not bad:
        return images, labels, None
    rows = [row for row in range(len(images)) if row not in bad]
    if not rows:
        raise DataError(f"{called}: no image can be decoded: {counted(list(bad.values()))}")
    left_out = f"{called}: left out: {counted(list(bad.values()))}"
    return images.chosen(rows), labels[rows], left_out
