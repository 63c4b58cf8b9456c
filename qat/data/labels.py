"""The labels in a column of a table: numbers of classes, truth values, or the classes' names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from qat.data.columns import Columns
from qat.errors import DataError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["check_label", "integer_names", "labels_of", "text_names"]

#: Wrong labels, or allowed ones, that an error shows.
_SHOWN: Final = 3
_LISTED: Final = 10
#: Bare numbers from this on are no classes: names for all below them would need memory without end.
_MOST_CLASSES: Final = 10**6


def labels_of(column: pa.ChunkedArray, columns: Columns, source: str) -> Tensor:
    """The labels (N,) int64 of a column; of texts, places in ``columns.class_names``.

    Raises:
        DataError: some are missing, negative, too large for a class, or none of the class names.
    """
    column = _plain(column, columns, source)
    if columns.kind == "texts":
        return _places(column, columns, source)
    most = len(columns.class_names) if columns.class_names is not None else None
    if most is None:
        _refuse_numbers(column, columns, source)
    values = column.combine_chunks().to_numpy(zero_copy_only=False)
    labels = torch.from_numpy(values.astype("int64"))
    wrong = (labels < 0) if most is None else (labels < 0) | (labels >= most)
    if wrong.any():
        rows = wrong.nonzero().flatten().tolist()
        shown = ", ".join(f"{int(labels[row])} in row {row}" for row in rows[:_SHOWN])
        allowed = "0 or more" if most is None else f"0 to {most - 1}"
        raise DataError(
            f"{source}: {len(rows)} labels in column {columns.label!r} are out of range: {shown}; allowed: "
            f"{allowed}"
        )
    return labels


def _plain(column: pa.ChunkedArray, columns: Columns, source: str) -> pa.ChunkedArray:
    """The column without an encoding as categories, and complete."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    missing = column.is_null()
    if columns.kind == "texts":
        missing = pc.or_(missing, pc.fill_null(pc.equal(column, ""), False))
    if count := pc.sum(missing).as_py():
        raise DataError(
            f"{source}: {count} labels are missing in column {columns.label!r}, first in row "
            f"{pc.index(missing, True).as_py()}"
        )
    return column


def _refuse_numbers(column: pa.ChunkedArray, columns: Columns, source: str) -> None:
    """Refuse bare numbers too large for classes."""
    import pyarrow.compute as pc

    largest = pc.max(column).as_py()
    if largest is not None and largest >= _MOST_CLASSES:
        raise DataError(
            f"{source}: column {columns.label!r} holds numbers up to {largest}, allowed for labels: 0 to "
            f"{_MOST_CLASSES - 1}, a number per class; if these are not labels, name the column of labels "
            "with --set data.label_column=NAME"
        )


def _places(column: pa.ChunkedArray, columns: Columns, source: str) -> Tensor:
    import pyarrow as pa
    import pyarrow.compute as pc

    names = columns.class_names
    assert names is not None  # whoever asks has read all of them
    found = pc.index_in(column, pa.array(names, column.type)).combine_chunks()
    if found.null_count:
        row = found.is_null().to_pylist().index(True)
        other = column[row].as_py()
        listed = ", ".join(map(repr, names[:_LISTED])) + (", …" if len(names) > _LISTED else "")
        raise DataError(
            f"{source}: {found.null_count} labels in column {columns.label!r} are no class of the training "
            f"split: {other!r} in row {row}{nearest(other, names)}; its classes are {listed}"
        )
    return torch.from_numpy(found.to_numpy(zero_copy_only=False).astype("int64"))


def check_label(label: object, columns: Columns, source: str) -> int:
    """A label of one row, checked as :func:`labels_of` does those of all.

    Raises:
        DataError: it is missing or out of range.
    """
    names = columns.class_names
    if columns.kind == "texts" and names is not None and label in names:
        return names.index(str(label))
    if columns.kind == "booleans" and isinstance(label, bool):
        return int(label)
    if not isinstance(label, int) or label < 0 or (names is not None and label >= len(names)):
        allowed = "0 or more" if names is None else f"0 to {len(names) - 1}"
        if columns.kind == "texts" and names is not None:
            allowed = ", ".join(map(repr, names[:_LISTED]))
        raise DataError(f"{source}: found {label!r} in column {columns.label!r}, allowed: {allowed}")
    return label


def integer_names(labels: Sequence[Tensor]) -> list[str]:
    """Names for classes that have none: the numbers from 0 to the largest label of any split."""
    return [str(label) for label in range(1 + max(int(found.max()) for found in labels if len(found)))]


def text_names(parts: Iterable[pa.ChunkedArray], columns: Columns, source: str) -> tuple[str, ...]:
    """The classes of a column of texts: each that is in one of ``parts``, sorted.

    Raises:
        DataError: some are missing.
    """
    found: set[str] = set()
    for column in parts:
        found.update(_plain(column, columns, source).unique().to_pylist())
    return tuple(sorted(found))
