"""Folders of Parquet files as data sets."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.datafiles import parquet_files, split_of
from qat.errors import DataError, first_line
from qat.quietdatasets import quiet_datasets
from qat.recipe import Data
from qat.split import Split, SplitName
from qat.tablecolumns import Columns, TableImages, find_columns, labels_of
from qat.tablesplit import TableSplit

if TYPE_CHECKING:
    import datasets

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
    """One split of the Parquet files in ``folder``; see `qat.data.load_split` for sizes and errors."""
    key, split = split_of(data, name)
    files = _read_footers(data, parquet_files(folder, split, key))
    names = _class_names(data, folder, name, files)
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
        return [str(label) for label in range(1 + max(_largest(one) for one in (files, other) if one))]
    if other is not None and other.columns.class_names != names:
        theirs = other.columns.class_names or ()
        difference = sorted(set(names) ^ set(theirs))
        what = f"{difference[0]!r} is in one alone" if difference else "the order is another"
        raise DataError(f"{files.source} and {other.source} must have the same classes, but {what}")
    return names


def _largest(files: _Files) -> int:
    import pyarrow.parquet as pq

    column = files.columns.label
    every = [
        labels_of(pq.read_table(path, columns=[column])[column], files.columns, str(path))
        for path in files.paths
    ]
    return max(int(labels.max()) for labels in every if len(labels))


def _load(files: _Files) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    wanted: dict[str, Any] = {"data_files": {"train": [glob.escape(str(path)) for path in files.paths]}}
    try:
        with quiet_datasets():
            return datasets.load_dataset(
                "parquet", split="train", columns=[files.columns.image, files.columns.label], **wanted
            )
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise DataError(f"{files.source}: cannot be read: {first_line(reason)}") from error
