"""Finds the columns of a table that hold images and labels, and reads them."""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qat.errors import DataError, nearest

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

__all__ = ["Columns", "LabelKind", "TableImages", "content_of", "find_columns"]

#: What a label column holds: numbers of named classes, bare numbers, truth values, or the classes' names.
LabelKind = Literal["classes", "integers", "booleans", "texts"]
_LABEL_KINDS: Final[tuple[LabelKind, ...]] = get_args(LabelKind)


@dataclass(frozen=True)
class Columns:
    """Names of the image column and the label column, and of the classes.

    ``class_names`` is ``None`` where the column itself doesn't tell them: of bare integers, and of texts
    before all are read.
    """

    image: str
    label: str
    class_names: tuple[str, ...] | None
    # Not in the text of it, which is part of the fingerprints of streamed data sets.
    kind: LabelKind = field(default="classes", repr=False)


def find_columns(features: Mapping[str, Any], image: str | None, label: str | None, source: str) -> Columns:
    """Find the image column and the label column of a table.

    A column of images has the feature `datasets.Image`, or bytes; a column of labels has
    `datasets.ClassLabel`, or integers, booleans or texts.

    Args:
        features: the table's features by column.
        image: value of ``data.image_column``; ``None`` takes the only column of images.
        label: value of ``data.label_column``; ``None`` takes the only column of class labels, or if there is
            none, the only column of integers, of booleans, or of texts.
        source: name of the table for messages.

    Raises:
        DataError: there is no such column, it holds something else, or several columns fit. The message lists
            the columns.
    """
    import datasets  # imported here: it takes two seconds

    def kind(name: str) -> str:
        feature = features[name]
        if isinstance(feature, datasets.Image) or _is_bytes(feature):
            return "images"
        if isinstance(feature, datasets.ClassLabel):
            return "classes"
        dtype = str(getattr(feature, "dtype", ""))
        if dtype in ("string", "large_string"):
            return "texts"
        return "booleans" if dtype == "bool" else "integers" if dtype.startswith(("int", "uint")) else "other"

    listed = ", ".join(f"{name} ({_shown(feature)})" for name, feature in features.items()) or "no columns"

    def choose(key: str, given: str | None, kinds: Sequence[str], what: str) -> str:
        if given is not None:
            if given not in features:
                raise DataError(
                    f"data.{key}: {source} has no column {given!r}{nearest(given, features)}; it has {listed}"
                )
            if kind(given) not in kinds:
                raise DataError(f"data.{key}: {source}: column {given!r} holds no {what}; it has {listed}")
            return given
        for wanted in kinds:
            fitting = [name for name in features if kind(name) == wanted]
            if len(fitting) == 1:
                return fitting[0]
            if fitting:
                raise DataError(
                    f"data.{key} is unset, and {source} has several columns of {what}: "
                    f"{', '.join(fitting)}; choose one with --set data.{key}=NAME"
                )
        raise DataError(f"data.{key}: {source} has no column of {what}; it has {listed}")

    found = choose("image_column", image, ["images"], "images")
    classes = choose("label_column", label, _LABEL_KINDS, "class labels")
    feature = features[classes]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) and feature.names else None
    (held,) = (one for one in _LABEL_KINDS if one == kind(classes))
    if held == "booleans":
        names = ("false", "true")
    return Columns(found, classes, names, "integers" if held == "classes" and names is None else held)


def _is_bytes(feature: object) -> bool:
    if isinstance(feature, Mapping):  # how `datasets` stores an image, in a table that lost its features
        return set(feature) == {"bytes", "path"} and _is_bytes(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _shown(feature: object) -> str:
    dtype = getattr(feature, "dtype", None)
    name = type(feature).__name__
    return str(dtype) if name == "Value" else name if name in ("Image", "ClassLabel") else name.lower()


def content_of(value: object) -> Path | bytes | None:
    """The content of a cell of an image column: encoded bytes, or else the path of a file.

    It is ``None`` where the cell is empty or names a file by a relative path, which can't be resolved.
    """
    if isinstance(value, bytes) or value is None:
        return value
    assert isinstance(value, Mapping)
    content, path = value["bytes"], value["path"]
    if content is not None:
        return bytes(content)
    return Path(path) if path is not None and Path(path).is_absolute() else None


class TableImages:
    """The encoded images in a column of a `datasets.Dataset`, as :class:`qat.data.decode.Encoded`.

    When it is pickled for a worker process, only the names of the table's files are copied. The worker maps
    the files into its own memory.
    """

    def __init__(self, table: datasets.Dataset, column: str, parts: Sequence[tuple[str, int]]) -> None:
        """Keep a column of a table.

        Args:
            table: the table.
            column: name of its image column.
            parts: name and number of rows of each file that the table was made of, for messages.
        """
        self._table = table.select_columns(column).with_format("arrow")
        self._column = column
        self._names = [name for name, _ in parts]
        self._starts = [0, *itertools.accumulate(rows for _, rows in parts)]
        self._values: pa.ChunkedArray | None = None
        self._chosen: NDArray[np.int64] | None = None

    def chosen(self, rows: Sequence[int]) -> TableImages:
        """The images at ``rows`` of these."""
        some = copy.copy(self)
        wanted = np.array(rows, np.int64)
        some._chosen = wanted if self._chosen is None else self._chosen[wanted]
        return some

    def _row(self, index: int) -> int:
        """The row of the table that an image is in."""
        return index if self._chosen is None else int(self._chosen[index])

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle: all but the column's values, which a worker reads from the table again."""
        return self.__dict__ | {"_values": None}

    def __len__(self) -> int:
        """Number of images."""
        return len(self._table) if self._chosen is None else len(self._chosen)

    @property
    def values(self) -> pa.ChunkedArray:
        """The values of the column: bytes, or structs of ``bytes`` and ``path``."""
        if self._values is None:
            self._values = self._table[:][self._column]
        return self._values

    def sizes(self) -> list[int | None]:
        """Size in bytes of each encoded image; ``None`` where the table names a file instead."""
        import pyarrow as pa
        import pyarrow.compute as pc

        content = self.values
        if pa.types.is_struct(content.type):
            content = pc.struct_field(content, "bytes")
        sizes: list[int | None] = pc.binary_length(content).to_pylist()
        return sizes if self._chosen is None else [sizes[row] for row in self._chosen]

    def image(self, index: int) -> Path | bytes:
        """The encoded bytes of an image, or the file that the table names instead.

        Raises:
            DataError: the cell holds neither.
        """
        content = content_of(self.values[self._row(index)].as_py())
        if content is not None:
            return content
        raise DataError(f"{self.name(index)}: holds no image in column {self._column!r}")

    def name(self, index: int) -> str:
        """Name of the image in messages: its file or data set, and the row in it."""
        row = self._row(index)
        part = min(bisect.bisect_right(self._starts, row), len(self._names)) - 1
        return f"{self._names[part]}: row {row - self._starts[part]}"
