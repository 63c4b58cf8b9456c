"""Folders ``ROOT/SPLIT/CLASS/image`` as a data set: listed at once, decoded batch by batch."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat.data.decode import content_hash, decoded_batches
from qat.data.paths import found_root
from qat.data.prefetch import prefetched
from qat.data.quiet_datasets import quiet_datasets
from qat.data.split import Split, SplitName
from qat.errors import DataError, nearest
from qat.recipe.schema import Data

__all__ = ["FolderSplit", "load_folder_split"]


class FolderSplit(Split):
    """Images ``folder/CLASS/file``, decoded when a batch asks for them."""

    resize: int

    def __init__(
        self,
        folder: Path,
        class_names: Sequence[str],
        files: Sequence[str],
        labels: Tensor,
        *,
        resize: int,
        side: int,
        workers: int,
    ) -> None:
        """Take paths relative to ``folder``; images are resized, then centre-cropped to ``side``."""
        super().__init__(class_names, labels)
        self.resize = resize
        self.side = side
        self.workers = workers
        self._images = _Files(folder, files)

    def fingerprint(self) -> str:
        """SHA-256 over relative file names, sizes in bytes and labels; it does not read the images."""
        digest = hashlib.sha256()
        for index, label in enumerate(self.labels.tolist()):
            path = self._images.image(index)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from error
            relative = path.relative_to(self._images.folder)
            digest.update(relative.as_posix().encode(errors="surrogateescape"))
            digest.update(f"\0{size}\0{label}\n".encode())
        return digest.hexdigest()

    def content_fingerprint(self) -> str:
        """SHA-256 over the SHA-256 of each file's bytes and its label, in order; names don't count.

        Raises:
            DataError: a file cannot be read.
        """
        return content_hash(self._images, self.labels)

    def image_name(self, index: int) -> str:
        """``CLASS/file``."""
        return self._images.image(index).relative_to(self._images.folder).as_posix()

    def _load(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loaded = decoded_batches(
            self._images, self.labels, batches, resize=self.resize, side=self.side, workers=self.workers
        )
        return loaded if self.workers else prefetched(loaded)


class _Files:
    """What a worker process needs to find an image."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self.folder = folder
        # One buffer of bytes: a list of a million strings would be copied into every forked worker as soon
        # as its reference counts change.
        self.files = np.array([os.fsencode(file) for file in files])

    def image(self, index: int) -> Path:
        return self.folder / os.fsdecode(self.files[index])

    def name(self, index: int) -> str:
        return str(self.image(index))


def load_folder_split(data: Data, name: SplitName) -> FolderSplit:
    """List the images of one split of ``data.root``; see `load_split` for sizes and errors."""
    root = found_root(data)
    key, split = (
        ("train_split", data.train_split) if name == "train" else ("test_split", data.evaluated_split)
    )
    folder = root / split
    if not folder.is_dir():
        present = _folders(root)
        listed = ", ".join(present) or "no folders"
        raise DataError(
            f"data.{key}: {root} has no folder {split!r}{nearest(split, present)}; it has {listed}"
        )
    classes = _folders(folder)
    other = root / (data.evaluated_split if name == "train" else data.train_split)
    if other.is_dir() and (difference := sorted(set(classes) ^ set(_folders(other)))):
        one = difference[0]
        where, missing = (folder, other) if one in classes else (other, folder)
        raise DataError(
            f"{root}: {folder.name!r} and {other.name!r} must have the same classes, but {len(difference)} "
            f"differ, among them {one!r}, which is in {where.name!r} and not in {missing.name!r}"
        )
    files, labels = _labelled_files(folder, classes)
    resize, side = data.shorter_side, data.loaded_side(name)
    return FolderSplit(folder, classes, files, labels, resize=resize, side=side, workers=data.workers)


def _folders(parent: Path) -> list[str]:
    with os.scandir(parent) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _labelled_files(folder: Path, classes: list[str]) -> tuple[list[str], Tensor]:
    """Sorted paths of the images relative to ``folder``, and their indices into ``classes``."""
    if not classes:
        raise DataError(f"{folder}: expected a folder of images per class, found none")
    import datasets  # imported here: it takes two seconds

    # One explicit pattern per class, and labels from the paths. Left to itself, `imagefolder` guesses splits
    # from words in paths, so that training images of a class named "test_tube" become test images too; it
    # drops the labels of a single class, and passes over class folders that are symbolic links.
    patterns = [
        str(Path(glob.escape(str(folder / name))) / "*") for name in classes if _has_files(folder / name)
    ]
    paths: list[Path] = []
    try:
        if patterns:
            with quiet_datasets():
                listing = datasets.load_dataset(
                    "imagefolder",
                    data_files={"train": patterns},
                    split="train",
                    drop_labels=True,
                    drop_metadata=True,
                )
            images = listing.cast_column("image", datasets.Image(decode=False))["image"]
            paths = sorted(Path(image["path"]).relative_to(folder) for image in images)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{folder}: cannot be listed: {error}") from error
    if empty := sorted(set(classes) - {path.parts[0] for path in paths}):
        raise DataError(f"{folder}: no images in the folder of class {', '.join(map(repr, empty[:5]))}")
    index = {name: label for label, name in enumerate(classes)}
    return [str(path) for path in paths], torch.tensor([index[path.parts[0]] for path in paths])


def _has_files(folder: Path) -> bool:
    if nested := _folders(folder):
        raise DataError(f"{folder}: has a folder {nested[0]!r}; images lie directly in their class's folder")
    return any(not name.startswith(".") for name in os.listdir(folder))  # noqa: PTH208 - a million names
