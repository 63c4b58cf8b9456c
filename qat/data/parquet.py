"""Folders of Parquet files as data sets, stored or streamed."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.data.columns import Columns, TableImages, find_columns, integer_names, labels_of
from qat.data.paths import parquet_files, split_of
from qat.data.quiet_datasets import quiet_datasets
from qat.data.split import Split, SplitName
from qat.data.stream import StreamedSplit
from qat.data.table import TableSplit
from qat.errors import DataError, first_line
from qat.recipe.schema import Data

__all__ = ["load_parquet_split"]


@dataclass(frozen=True)
class _Files:
    """The files of one split, the number of rows in each, and the columns, which are the same in all."""

    paths: list[Path]
    rows: list[int]
    columns: Columns

    @property
    def source(self) -> str:
        """Name of the files in messages: the path of a single one, or a pattern."""
        first = self.paths[0]
        return str(
            first if len(self.paths) == 1 else first.parent / f"{first.stem.partition('-')[0]}-*.parquet"
        )


def load_parquet_split(data: Data, folder: Path, name: SplitName) -> Split:
    """The split ``name`` of the Parquet files in ``folder``; see :func:`qat.data.loading.load_split`."""
    key, split = split_of(data, name)
    files = _read_footers(data, parquet_files(folder, split, key))
    names = _class_names(data, folder, name, files)
    if data.streaming and name == "train":
        return _streamed(data, files, names)
    table = _load(files)
    labels = labels_of(table.with_format("arrow")[:][files.columns.label], files.columns, files.source)
    parts = [(str(path), rows) for path, rows in zip(files.paths, files.rows, strict=True)]
    return TableSplit(
        TableImages(table, files.columns.image, parts),
        names,
        labels,
        resize=data.shorter_side,
        side=data.loaded_side(name),
        workers=data.workers,
        in_memory=data.in_memory,
    )


def _streamed(data: Data, files: _Files, names: Sequence[str]) -> StreamedSplit:
    import datasets

    stream, image = _load(files, streaming=True), files.columns.image
    if isinstance(stream.features[image], datasets.Image):
        stream = stream.cast_column(image, datasets.Image(decode=False))
    return StreamedSplit(
        stream,
        files.columns,
        names,
        sum(files.rows),
        source=files.source,
        identity="\0".join([*map(_identity, files.paths), _labels_hash(files), str(files.columns)]),
        resize=data.shorter_side,
        side=data.loaded_side("train"),
        workers=data.workers,
        shuffle_buffer=data.shuffle_buffer,
    )


def _identity(path: Path) -> str:
    """A file's name, size and the hash of its footer, which has statistics of each chunk of a column."""
    with path.open("rb") as file:
        size = file.seek(-8, os.SEEK_END) + 8
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return f"{path.name} {size} {hashlib.sha256(file.read(length)).hexdigest()}"


def _labels_hash(files: _Files) -> str:
    """SHA-256 over all labels, since a footer can be the same after a label has changed."""
    digest = hashlib.sha256()
    for labels in _labels(files):
        digest.update(labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _read_footers(data: Data, paths: list[Path]) -> _Files:
    """Read the number of rows and the columns from the footers of the files, without reading images.

    Raises:
        DataError: a file is not Parquet, lacks a column, has other columns than the first, or there are no
            rows.
    """
    import datasets  # imported here: it takes two seconds
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[int] = []
    columns: Columns | None = None
    for path in paths:
        try:
            footer = pq.read_metadata(path)
            features = datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema())
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read as Parquet: {first_line(error)}") from error
        found = find_columns(features, data.image_column, data.label_column, str(path))
        if columns is not None and found != columns:
            raise DataError(f"{path}: has other columns or classes than {paths[0].name} beside it")
        columns = found
        rows.append(footer.num_rows)
    assert columns is not None  # there is a file
    files = _Files(paths, rows, columns)
    if not sum(rows):
        raise DataError(f"{files.source}: holds no images")
    return files


def _class_names(data: Data, folder: Path, name: SplitName, files: _Files) -> Sequence[str]:
    """Names of the classes, after a check that the other split, if there is one, has the same.

    Raises:
        DataError: the splits have different classes, or the same in another order.
    """
    key, split = split_of(data, "test" if name == "train" else "train")
    try:
        other = _read_footers(data, parquet_files(folder, split, key))
    except DataError:  # problems of the other split are reported when it is loaded itself
        other = None
    names = files.columns.class_names
    if names is None:
        # Labels are integers without names. Both splits are read, because one alone may lack the last class.
        return integer_names([labels for one in (files, other) if one for labels in _labels(one)])
    if other is not None and other.columns.class_names != names:
        theirs = other.columns.class_names or ()
        difference = sorted(set(names) ^ set(theirs))
        what = f"{difference[0]!r} is in one alone" if difference else "the order is another"
        raise DataError(f"{files.source} and {other.source} must have the same classes, but {what}")
    return names


def _labels(files: _Files) -> Iterator[Tensor]:
    """Yield the labels in each file, int64 (rows,)."""
    import pyarrow.parquet as pq

    column = files.columns.label
    for path in files.paths:
        yield labels_of(pq.read_table(path, columns=[column])[column], files.columns, str(path))


def _load(files: _Files, streaming: bool = False) -> Any:
    """The image and label columns as a `datasets.Dataset`, or with ``streaming`` as an `IterableDataset`."""
    import datasets
    import pyarrow as pa

    wanted: dict[str, Any] = {"data_files": {"train": [glob.escape(str(path)) for path in files.paths]}}
    try:
        with quiet_datasets():
            return datasets.load_dataset(
                "parquet",
                split="train",
                streaming=streaming,
                columns=[files.columns.image, files.columns.label],
                **wanted,
            )
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise DataError(f"{files.source}: cannot be read: {first_line(reason)}") from error
