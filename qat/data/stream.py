"""Training images that are streamed: files in shuffled order, through a shuffled buffer, nothing stored."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat.data.columns import Columns, content_of
from qat.data.decode import decode
from qat.data.labels import check_label
from qat.data.prefetch import prefetched
from qat.data.split import Split
from qat.errors import DataError, first_line

if TYPE_CHECKING:
    import datasets

__all__ = ["StreamedSplit"]

#: One row of the stream: its name in messages, the encoded image and the label.
_Row = tuple[str, bytes, int]


class StreamedSplit(Split):
    """Images of a `datasets.IterableDataset`. Labels are only known when their batch is read.

    The order depends on nothing but the shuffle seed: files are permuted, and their rows pass through a
    buffer, from which each row that comes in replaces a random one, which is yielded. Rows of skipped batches
    and of another ``share`` are read, but not decoded. If the stream breaks off, or a row has no image or a
    wrong label, :meth:`batches` raises a ``DataError``.
    """

    resize: int

    def __init__(
        self,
        stream: datasets.IterableDataset,
        columns: Columns,
        class_names: Sequence[str],
        count: int,
        *,
        source: str,
        identity: str,
        resize: int,
        side: int,
        workers: int = 0,
        shuffle_buffer: int = 2048,
        turn: bool = False,
    ) -> None:
        """Take a stream of ``count`` rows.

        Args:
            stream: rows with encoded images.
            columns: which columns hold the images and labels.
            class_names: names of the classes in label order.
            count: number of rows.
            source: name of the stream in messages.
            identity: a text that differs for different images; the fingerprint is made from it.
            resize, side, turn: see :func:`qat.data.decode.decode`.
            workers: number of threads that decode; 0 counts as 1.
            shuffle_buffer: number of rows in the buffer.
        """
        super().__init__(class_names, torch.empty(0, dtype=torch.int64))
        self.resize = resize
        self.side = side
        self.turn = turn
        self._stream, self._columns, self._count = stream, columns, count
        self._source, self._identity = source, identity
        self._threads, self._buffer = max(1, workers), shuffle_buffer

    @property
    def labels(self) -> Tensor:
        """The labels of a stream are not known beforehand.

        Raises:
            DataError: always.
        """
        raise DataError(
            f"{self._source}: is streamed, so its labels are not known beforehand; set data.streaming=false"
        )

    def __len__(self) -> int:
        """Number of images."""
        return self._count

    def fingerprint(self) -> str:
        """SHA-256 over the stream's ``identity`` and number of images. The images are not read."""
        return hashlib.sha256(f"{self._identity}\0{self._count}".encode()).hexdigest()

    def _batches(
        self, shuffle_seed: int | None, passed: int, sizes: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return prefetched(self._decoded(self._rows(shuffle_seed), passed, sizes))

    def _load(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        raise DataError(f"{self._source}: is streamed: no image can be picked; set data.streaming=false")

    def _decoded(
        self, rows: Iterator[_Row], passed: int, sizes: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of the given sizes from ``rows``, after the first ``passed`` rows."""
        next(itertools.islice(rows, passed, passed), None)
        with ThreadPoolExecutor(self._threads) as pool:
            for size in sizes:
                chosen = list(itertools.islice(rows, size))
                if len(chosen) < size:
                    raise DataError(
                        f"{self._source}: ended before the {self._count} images that it should have"
                    )
                part = chosen[self.share.of(size)]
                # An empty part, (0, 3, H, W), takes its height and width from an image that is decoded for
                # it.
                decoded = part or chosen[:1]
                images = pool.map(self._pixels, decoded)
                labels = torch.tensor([row[2] for row in part], dtype=torch.int64)
                yield torch.from_numpy(np.stack(list(images)))[: len(part)], labels

    def _pixels(self, row: _Row) -> NDArray[np.uint8]:
        name, content, _ = row
        pixels = decode(content, self.resize, self.side, name, turn=self.turn).numpy()
        return np.asarray(pixels, np.uint8)

    def _rows(self, seed: int | None) -> Iterator[_Row]:
        """Yield all rows in the order of the shuffle seed ``seed``, or in the order of the files."""
        if seed is None:
            yield from self._in_order(range(self._stream.num_shards))
            return
        # The rows are not shuffled by `datasets`, whose order could change with its version, since a resumed
        # run has to see the images that it would have seen.
        generator = random.Random(seed)
        shards = list(range(self._stream.num_shards))
        generator.shuffle(shards)
        buffer: list[_Row] = []
        for row in self._in_order(shards):
            if len(buffer) < self._buffer:
                buffer.append(row)
                continue
            place = generator.randrange(self._buffer)
            yield buffer[place]
            buffer[place] = row
        generator.shuffle(buffer)
        yield from buffer

    def _in_order(self, shards: Sequence[int]) -> Iterator[_Row]:
        """Yield the rows of one file (shard) after the other."""
        count = self._stream.num_shards
        several = count > 1
        for shard in shards:
            name = f"{self._source}, file {shard + 1} of {count}" if several else self._source
            part = self._stream.shard(num_shards=count, index=shard) if several else self._stream
            for number, row in enumerate(_guarded(iter(part), name)):
                called = f"{name}: row {number}"
                content = content_of(row[self._columns.image])
                if not isinstance(content, bytes):
                    raise DataError(f"{called}: holds no image in column {self._columns.image!r}")
                yield called, content, check_label(row[self._columns.label], self._columns, called)


def _guarded(rows: Iterator[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Yield ``rows``, and raise a ``DataError`` in place of any exception of the disk or the network."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        # Exceptions of `datasets`, its file systems, the HTTP library and Arrow have no common base class.
        except Exception as error:
            raise DataError(f"{name}: cannot be read on: {first_line(error)}") from error
        yield row
