"""Folders ``ROOT/SPLIT/CLASS/image`` as a data set, whose images are decoded batch by batch."""

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
        """Make a split of image files.

        Args:
            folder: folder of the split.
            class_names: names of the classes in label order.
            files: path of each image relative to ``folder``.
            labels: int64 (N,).
            resize, side: see :func:`qat.data.decode.decode`.
            workers: number of processes that decode; 0 decodes in a thread.
        """
        super().__init__(class_names, labels)
        self.resize = resize
        self.side = side
        self.workers = workers
        self._images = _Files(folder, files)

    def fingerprint(self) -> str:
        """SHA-256 over relative file names, sizes in bytes and labels. The images are not read.

        Raises:
            DataError: a file is missing.
        """
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
        """SHA-256 over the SHA-256 of each file's bytes and its label, in order, but not over file names.

        Raises:
            DataError: a file can't be read.
        """
        return content_hash(self._images, self.labels)

    def _load(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loaded = decoded_batches(
            self._images, self.labels, batches, resize=self.resize, side=self.side, workers=self.workers
        )
        return loaded if self.workers else prefetched(loaded)


class _Files:
    """The files of the images. It is pickled for worker processes."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self.folder = folder
        # The names are one buffer of bytes. A list of a million strings would be copied into every forked
        # worker, because each access changes a string's reference count.
        self.files = np.array([os.fsencode(file) for file in files])

    def image(self, index: int) -> Path:
        return self.folder / os.fsdecode(self.files[index])

    def name(self, index: int) -> str:
        return str(self.image(index))


def load_folder_split(data: Data, name: SplitName) -> FolderSplit:
    """The split ``name`` of the image folders in ``data.root``; see :func:`qat.data.loading.load_split`."""
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
    """Sorted paths of the images relative to ``folder``, and their int64 labels, which index ``classes``.

    Raises:
        DataError: there are no classes, a class has no images, or a folder can't be listed.
    """
    if not classes:
        raise DataError(f"{folder}: expected a folder of images per class, found none")
    import datasets  # imported here: it takes two seconds

    # `imagefolder` of `datasets` is given one pattern per class, and labels are taken from the paths. By
    # itself it would guess splits from words in paths, so that training images of a class "test_tube" became
    # test images. It would also drop the labels of a single class, and skip class folders that are symbolic
    # links.
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
