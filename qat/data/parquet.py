"""Folders of Parquet files as data sets, stored or streamed."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.data.columns import Columns, TableImages, find_columns
from qat.data.held_out import held_out, held_out_note
from qat.data.labels import integer_names, labels_of, text_names
from qat.data.layout import Layout, find_layout
from qat.data.paths import parquet_files, parquet_splits
from qat.data.problems import Problem
from qat.data.quiet_datasets import quiet_datasets
from qat.data.split import Split, SplitName
from qat.data.stream import StreamedSplit
from qat.data.table import TableSplit, without_broken
from qat.errors import DataError, first_line
from qat.recipe.schema import Data

__all__ = ["load_parquet_split"]


@dataclass(frozen=True)
class _Files:
    """The files of one split, the number of rows in each, and the columns, which are the same in all."""

    paths: list[Path]
    rows: list[int]
    columns: Columns
    #: What the columns hold, for `datasets`.
    features: Any = None

    @property
    def source(self) -> str:
        """Name of the files in messages: the path of a single one, or a pattern."""
        first = self.paths[0]
        return str(
            first if len(self.paths) == 1 else first.parent / f"{first.stem.partition('-')[0]}-*.parquet"
        )


def load_parquet_split(
    data: Data, folder: Path, name: SplitName, problems: list[Problem] | None = None
) -> Split:
    """The split ``name`` of the Parquet files in ``folder``; see :func:`qat.data.loading.load_split`.

    ``problems`` takes none: they are found by decoding.
    """
    layout = parquet_layout(data, folder)
    split = layout.of(name) or layout.train
    files = _read_footers(data, parquet_files(folder, split, layout.key(name)))
    names = _class_names(data, folder, layout, name, files)
    if files.columns.kind == "texts":
        files = replace(files, columns=replace(files.columns, class_names=tuple(names)))
    if data.streaming and name == "train":
        if layout.share is not None:
            raise DataError(
                f"data.streaming: {folder} has no validation split, and of images that are streamed none can "
                "be held out; add one, or set data.streaming=false"
            )
        return _streamed(data, files, names)
    table = _load(files)
    labels = labels_of(table.with_format("arrow")[:][files.columns.label], files.columns, files.source)
    parts = [(str(path), rows) for path, rows in zip(files.paths, files.rows, strict=True)]
    images = TableImages(table, files.columns.image, parts)
    notes: list[str] = []
    left_out = None
    if layout.share is not None and name != "final":
        rows_names = [Path(images.name(row)).name for row in range(len(images))]
        chosen = held_out(rows_names, labels, layout.share, files.source)
        if name == "test":
            notes.append(held_out_note(chosen, layout.share))
        rows = (chosen if name == "test" else ~chosen).nonzero().flatten()
        images, labels = images.chosen(rows.tolist()), labels[rows]
    if problems is None and data.on_error == "skip":
        turn, called = data.exif_orientation, layout.called(name)
        images, labels, left_out = without_broken(images, labels, turn, called)
    found = TableSplit(
        images,
        names,
        labels,
        resize=data.shorter_side,
        side=data.loaded_side("train" if name == "train" else "test"),
        workers=data.workers,
        in_memory=data.in_memory,
        turn=data.exif_orientation,
    )
    found.name, found.left_out = layout.called(name), left_out
    found.notes = [*notes, *(layout.notes if name == "test" else ())]
    return found


def parquet_layout(data: Data, folder: Path) -> Layout:
    """Which files of ``folder`` are the splits; of CIFAR-10 those that are named."""
    if data.dataset == "cifar10":
        final = data.final_split if data.final_split != data.evaluated_split else None
        return Layout(data.train_split, data.evaluated_split, final=final)
    present = parquet_splits(folder)

    def columns(split: str) -> Columns:
        return _read_footers(data, parquet_files(folder, split, "train_split")).columns

    def misfit(train: str, other: str) -> str | None:
        try:
            same = columns(train) == columns(other)
        except DataError as error:
            return str(error)
        return None if same else f"its columns or classes are not those of {train!r}"

    return find_layout(
        data,
        present,
        folder,
        exists=lambda split: any(one == split or one.startswith(f"{split}-") for one in present),
        misfit=misfit,
        flat=False,
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
        turn=data.exif_orientation,
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
    features: Any = None
    for path in paths:
        try:
            footer = pq.read_metadata(path)
            features = datasets.Features.from_arrow_schema(_plain(footer.schema.to_arrow_schema()))
        except (OSError, ValueError, TypeError, KeyError, NotImplementedError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read as Parquet: {first_line(error)}") from error
        found = find_columns(features, data.image_column, data.label_column, str(path))
        if columns is not None and found != columns:
            raise DataError(f"{path}: has other columns or classes than {paths[0].name} beside it")
        columns = found
        rows.append(footer.num_rows)
    assert columns is not None  # there is a file
    both = datasets.Features({name: features[name] for name in (columns.image, columns.label)})
    files = _Files(paths, rows, columns, both)
    if not sum(rows):
        raise DataError(f"{files.source}: holds no images")
    return files


def _plain(schema: Any) -> Any:
    """An Arrow schema with values for categories, which `datasets` doesn't know."""
    import pyarrow as pa

    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in schema
    ]
    return pa.schema(fields, metadata=schema.metadata)


def _class_names(data: Data, folder: Path, layout: Layout, name: SplitName, files: _Files) -> Sequence[str]:
    """Names of the classes, after a check that the other split, if there is one, has the same.

    Raises:
        DataError: the splits have different classes, or the same in another order.
    """
    other_name: SplitName = "test" if name == "train" else "train"
    split = layout.of(other_name)
    try:
        if split is None or split == layout.of(name):
            other = None
        else:
            other = _read_footers(data, parquet_files(folder, split, layout.key(other_name)))
    except DataError:  # problems of the other split are reported when it is loaded itself
        other = None
    columns = files.columns
    if columns.kind == "texts":
        # Only what the training split has can be learned.
        known = files if name == "train" or other is None else other
        return text_names(_label_columns(known), known.columns, known.source)
    names = columns.class_names
    if names is None:
        # Labels are integers without names. Both splits are read, because one alone may lack the last class.
        return integer_names([labels for one in (files, other) if one for labels in _labels(one)])
    if other is not None and other.columns.class_names != names:
        theirs = other.columns.class_names or ()
        difference = sorted(set(names) ^ set(theirs))
        what = f"{difference[0]!r} is in one alone" if difference else "the order is another"
        raise DataError(f"{files.source} and {other.source} must have the same classes, but {what}")
    return names


def _label_columns(files: _Files) -> Iterator[Any]:
    """The column of labels of each file."""
    import pyarrow.parquet as pq

    for path in files.paths:
        yield pq.read_table(path, columns=[files.columns.label])[files.columns.label]


def _labels(files: _Files) -> Iterator[Tensor]:
    """The labels in each file."""
    for path, column in zip(files.paths, _label_columns(files), strict=True):
        yield labels_of(column, files.columns, str(path))


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
                features=files.features,
                **wanted,
            )
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        cache, blamed = Path(datasets.config.HF_DATASETS_CACHE), getattr(error, "filename", None)
        if blamed and (Path(blamed).is_relative_to(cache) or cache.is_relative_to(blamed)):
            raise DataError(
                f"{cache}: the cache that Parquet files are unpacked into cannot be written "
                f"({first_line(error)}); name a folder for it with the environment variable HF_HOME"
            ) from error
        reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise DataError(f"{files.source}: cannot be read: {first_line(reason)}") from error
