"""The classes of a folder data set: which folders they are, and that all splits have the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qat.data.layout import Layout, is_split_word
from qat.data.listing import class_folders, direct_images, list_images, named, same_name
from qat.data.problems import Problem
from qat.data.split import SplitName
from qat.errors import DataError, nearest

__all__ = ["Classes", "agreed_classes", "no_class_folders", "no_images"]


@dataclass(frozen=True)
class Classes:
    """The classes of a split.

    Attributes:
        folder: where their folders lie.
        names: in label order, as the training split spells them.
        labels: by the names of the folders, in order.
        problems: links beside the folders that lead nowhere.
    """

    folder: Path
    names: list[str]
    labels: dict[str, int]
    problems: list[Problem]


def agreed_classes(root: Path, layout: Layout, name: SplitName) -> Classes:
    """The classes of a split, which the training split has, too, if it is there.

    Raises:
        DataError: the split is missing, has no classes, or other ones.
    """
    split = layout.of(name) or layout.train
    folder = root / split
    if not folder.is_dir():
        present = class_folders(root).names
        listed = ", ".join(present) or "no folders"
        raise DataError(
            f"data.{layout.key(name)}: {root} has no folder {split!r}{nearest(split, present)}; it has "
            f"{listed}"
        )
    found = class_folders(folder)
    if not found.names:
        raise no_class_folders(folder)
    names = found.names
    other = root / ((layout.evaluated if name == "train" else None) or layout.train)
    if other.is_dir() and not other.samefile(folder):
        theirs = class_folders(other).names
        _check_same((folder, names), (other, theirs))
        if name != "train":
            names = theirs
    labels = {same_name(one): label for label, one in enumerate(names)}
    return Classes(folder, names, {one: labels[same_name(one)] for one in found.names}, found.problems)


def _check_same(one: tuple[Path, Sequence[str]], other: tuple[Path, Sequence[str]]) -> None:
    """Refuse folders with different classes."""
    forms = [(folder, {same_name(name): name for name in names}) for folder, names in (one, other)]
    different = sorted(forms[0][1].keys() ^ forms[1][1].keys())
    for form in different:
        (where, mine), (missing, _) = forms if form in forms[0][1] else reversed(forms)
        if not list_images(where, [mine[form]]).files:
            raise DataError(
                f"{where / mine[form]}: this class's folder has no images, and {missing.name!r} has no such "
                "folder; fill both, or remove this one"
            )
    if different:
        here, there = (one, other) if different[0] in forms[0][1] else (other, one)
        raise DataError(
            f"{one[0].parent}: {one[0].name!r} and {other[0].name!r} must have the same classes, but "
            f"{len(different)} {'differ' if len(different) > 1 else 'differs'}, among them {different[0]!r}, "
            f"which is in {here[0].name!r} and not in {there[0].name!r}"
        )


def no_images(folder: Path, names: Sequence[str], passed_over: int, example: str | None) -> DataError:
    """The error about classes ``names`` whose folders hold no images."""
    other = f" (passed over: {passed_over} other files, such as {example})" if example is not None else ""
    return DataError(
        f"{folder}: no images in the folder of class {named(names)}{other}; fill it, or remove it in every "
        "split"
    )


def no_class_folders(folder: Path) -> DataError:
    """The error about images, or nothing at all, where folders of classes should be."""
    images = sorted(direct_images(folder))
    found = "found none"
    if images:
        count = "1 image" if len(images) == 1 else f"{len(images)} images"
        found = f"found {count} without a folder ({named(images, 3)})"
        if is_split_word(folder.name):
            found += f"; if {folder.name!r} is a class itself, set data.train_split=."
    if any(folder.glob("*.parquet")):
        found += "; its Parquet files are read with --set data.dataset=parquet"
    return DataError(
        f"{folder}: expected a folder of images per class, {found}; the name of a folder is the class: "
        "ROOT/train/CLASS/IMAGE and ROOT/validation/CLASS/IMAGE, or ROOT/CLASS/IMAGE"
    )
