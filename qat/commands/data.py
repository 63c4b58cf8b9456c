"""What `qat data check` does: decode every image of a data set, and name those that cannot be used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, get_args

from qat.data.folder import FolderSplit
from qat.data.loading import load_every
from qat.data.probing import probe
from qat.data.problems import Kind, Problem
from qat.data.table import TableSplit
from qat.errors import DataError
from qat.recipe.schema import Data


class Watch(Protocol):
    """Told how far a check is."""

    def expect(self, steps: int) -> None:
        """So many images are going to be decoded."""

    def done(self, what: str) -> None:
        """One image of the split ``what`` was."""


@dataclass(frozen=True)
class CheckedSplit:
    """A split as it was found.

    Attributes:
        name: of the split.
        purpose: ``train``, ``test`` (epochs are chosen on it) or ``final``.
        images: number of files that seem to be images, with those that cannot be used.
        classes: number of classes.
        smallest, largest: images of the smallest and of the largest class.
        passed_over: files in the folders of classes that are no pictures.
    """

    name: str
    purpose: str
    images: int
    classes: int
    smallest: int
    largest: int
    passed_over: int


@dataclass(frozen=True)
class CheckedData:
    """What a check found."""

    splits: Sequence[CheckedSplit]
    problems: Sequence[Problem]
    notes: Sequence[str]

    def counts(self) -> dict[str, int]:
        """Problems by kind."""
        found = Counter(problem.kind for problem in self.problems)
        return {kind: found[kind] for kind in get_args(Kind)}

    def to_json(self) -> str:
        """One JSON object."""
        content = {
            "splits": [asdict(split) for split in self.splits],
            "problems": [asdict(problem) for problem in self.problems],
            "counts": self.counts(),
            "notes": list(self.notes),
        }
        return json.dumps(content, indent=2)


def data_in(folder: Path) -> Data:
    """The data set in ``folder``: of Parquet files where there are some, else of image folders.

    Raises:
        DataError: it cannot be read.
    """
    try:
        parquet = any(path.suffix == ".parquet" for path in folder.iterdir()) if folder.is_dir() else False
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    return Data(dataset="parquet" if parquet else "imagefolder", root=str(folder))


def check_data(data: Data, watch: Watch) -> CheckedData:
    """Decode every image of all splits of ``data``.

    Raises:
        DataError: the splits or classes cannot be told.
    """
    problems: list[Problem] = []
    splits = load_every(data.model_copy(update={"streaming": False}), problems)
    listed = [split for split in splits if isinstance(split, FolderSplit | TableSplit)]
    watch.expect(sum(map(len, listed)))
    for split in listed:
        problems += probe(
            split.encoded, range(len(split)), turn=data.exif_orientation, tick=_tick(watch, str(split.name))
        ).values()
    checked = []
    for purpose, one in zip(splits._fields, splits, strict=True):
        if one is None:
            continue
        sizes = one.labels.bincount(minlength=one.num_classes).tolist()
        over = one.passed_over if isinstance(one, FolderSplit) else 0
        name = one.name or (data.train_split if purpose == "train" else data.evaluated_split)
        checked.append(CheckedSplit(name, purpose, len(one), one.num_classes, min(sizes), max(sizes), over))
    notes = [note for one in splits if one is not None for note in one.notes]
    return CheckedData(checked, list(dict.fromkeys(problems)), notes)


def _tick(watch: Watch, name: str) -> Callable[[], None]:
    return lambda: watch.done(name)
