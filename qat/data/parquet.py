"""Folders of Parquet files as data sets."""

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
    """Files of one split, the rows of each, and the columns that all of them have."""

    paths: list[Path]
    rows: list[int]
    columns: Columns

    @property
    def source(self) -> str:
        """What errors call them."""
        first = self.paths[0]
        return str(
            first if len(self.paths) == 1 else first.parent / f"{first.stem.partition('-')[0]}-*.parquet"
        )


def load_parquet_split(data: Data, folder: Path, name: SplitName) -> Split:
    """One split of the Parquet files in ``folder``; see `load_split` for sizes and errors."""
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
    """Name, size and footer of a file: the footer has sizes and statistics of every piece of a column."""
    with path.open("rb") as file:
        size = file.seek(-8, os.SEEK_END) + 8
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return f"{path.name} {size} {hashlib.sha256(file.read(length)).hexdigest()}"


def _labels_hash(files: _Files) -> str:
    """Hash of every label: a footer may stay as it is when one changes."""
    digest = hashlib.sha256()
    for labels in _labels(files):
        digest.update(labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _read_footers(data: Data, paths: list[Path]) -> _Files:
    """What the files' footers say; images are not read."""
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
    """Names of the classes, which the other split must have, too, if it is there."""
    key, split = split_of(data, "test" if name == "train" else "train")
    try:
        other = _read_footers(data, parquet_files(folder, split, key))
    except DataError:  # it is looked at when it is asked for
        other = None
    names = files.columns.class_names
    if names is None:
        # Bare integers: one split alone may lack the last class.
        return integer_names([labels for one in (files, other) if one for labels in _labels(one)])
    if other is not None and other.columns.class_names != names:
        theirs = other.columns.class_names or ()
        difference = sorted(set(names) ^ set(theirs))
        what = f"{difference[0]!r} is in one alone" if difference else "the order is another"
        raise DataError(f"{files.source} and {other.source} must have the same classes, but {what}")
    return names


def _labels(files: _Files) -> Iterator[Tensor]:
    """The labels in each file."""
    import pyarrow.parquet as pq

    column = files.columns.label
    for path in files.paths:
        yield labels_of(pq.read_table(path, columns=[column])[column], files.columns, str(path))


def _load(files: _Files, streaming: bool = False) -> Any:
    """The two columns as a `datasets.Dataset`, or an `IterableDataset`."""
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
