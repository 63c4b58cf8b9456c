"""Folders ``ROOT/SPLIT/CLASS/image`` as a data set, whose images are decoded batch by batch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat.data.classes import agreed_classes, no_class_folders, no_images
from qat.data.decode import content_hash, decoded_batches
from qat.data.held_out import held_out, held_out_note
from qat.data.layout import HERE, Layout, find_layout, is_split_word
from qat.data.listing import class_folders, list_images, same_name
from qat.data.paths import found_root
from qat.data.prefetch import prefetched
from qat.data.probing import probe, probe_headers
from qat.data.problems import Problem, counted, refusal
from qat.data.split import Split, SplitName
from qat.errors import DataError
from qat.recipe.schema import Data

__all__ = ["FolderSplit", "folder_layout", "load_folder_split"]


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
        turn: bool = False,
    ) -> None:
        """Make a split of image files.

        Args:
            folder: folder of the split.
            class_names: names of the classes in label order.
            files: path of each image relative to ``folder``.
            labels: int64 (N,).
            resize, side, turn: see :func:`qat.data.decode.decode`.
            workers: number of processes that decode; 0 decodes in a thread.
        """
        super().__init__(class_names, labels)
        self.resize = resize
        self.side = side
        self.workers = workers
        self.turn = turn
        self.encoded = _Files(folder, files)
        #: Files beside them that are no pictures.
        self.passed_over = 0

    def fingerprint(self) -> str:
        """SHA-256 over relative file names, sizes in bytes and labels. The images are not read.

        Raises:
            DataError: a file is missing.
        """
        digest = hashlib.sha256()
        for index, label in enumerate(self.labels.tolist()):
            path = self.encoded.image(index)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from error
            relative = path.relative_to(self.encoded.folder)
            digest.update(relative.as_posix().encode(errors="surrogateescape"))
            digest.update(f"\0{size}\0{label}\n".encode())
        return digest.hexdigest()

    def content_fingerprint(self) -> str:
        """SHA-256 over the SHA-256 of each file's bytes and its label, in order, but not over file names.

        Raises:
            DataError: a file can't be read.
        """
        return content_hash(self.encoded, self.labels)

    def header_problems(self) -> list[Problem]:
        """Files that are no images, as their first bytes tell."""
        return list(probe_headers(self.encoded, range(len(self))).values())

    def image_name(self, index: int) -> str:
        """``CLASS/file``."""
        return self.encoded.image(index).relative_to(self.encoded.folder).as_posix()

    def _load(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loaded = decoded_batches(
            self.encoded,
            self.labels,
            batches,
            resize=self.resize,
            side=self.side,
            workers=self.workers,
            turn=self.turn,
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


def load_folder_split(data: Data, name: SplitName, problems: list[Problem] | None = None) -> FolderSplit:
    """The split ``name`` of the image folders in ``data.root``; see :func:`qat.data.loading.load_split`."""
    root = found_root(data)
    layout = folder_layout(data, root)
    classes = agreed_classes(root, layout, name)
    listing = list_images(classes.folder, classes.labels)
    found, files, notes = classes.problems + listing.problems, listing.files, []
    labels = torch.tensor([classes.labels[file.partition("/")[0]] for file in files], dtype=torch.int64)
    if layout.share is not None and name != "final":
        chosen = held_out(files, labels, layout.share, classes.folder)
        if name == "test":
            notes.append(held_out_note(chosen, layout.share))
        files, labels = _at(files, labels, chosen if name == "test" else ~chosen)
    encoded, left_out = _Files(classes.folder, files), None
    if problems is None and data.on_error == "skip":
        bad = probe(encoded, range(len(files)), turn=data.exif_orientation)
        found += bad.values()
        if found:
            left_out = f"{layout.called(name)}: left out: {counted(found, classes.folder)}"
        files, labels = _at(files, labels, torch.tensor([row not in bad for row in range(len(files))]))
    elif problems is not None:
        problems += found
    elif found:
        raise refusal(found, classes.folder)
    # Of a class with a single image, nothing is held out.
    missing = [] if layout.share is not None and files else _missing(labels, classes.names)
    if missing and not problems:
        raise no_images(classes.folder, missing, listing.passed_over, listing.example)
    split = FolderSplit(
        classes.folder,
        classes.names,
        files,
        labels,
        resize=data.shorter_side,
        side=data.loaded_side("train" if name == "train" else "test"),
        workers=data.workers,
        turn=data.exif_orientation,
    )
    split.name, split.left_out = layout.called(name), left_out
    split.notes = [*notes, *(layout.notes if name == "test" else ())]
    split.passed_over = listing.passed_over
    return split


def _missing(labels: Tensor, names: Sequence[str]) -> list[str]:
    """The classes that no image has."""
    present = set(labels.tolist())
    return [name for label, name in enumerate(names) if label not in present]


def folder_layout(data: Data, root: Path) -> Layout:
    """Which folders of ``root`` are the splits.

    Raises:
        DataError: none can be told, because there are no folders, or because they lie one level deeper.
    """
    present = class_folders(root).names

    def misfit(train: str, other: str) -> str | None:
        theirs = {same_name(name) for name in class_folders(root / other).names}
        ours = {same_name(name) for name in class_folders(root / train).names}
        if not theirs:
            return "it has no folders of classes"
        return None if theirs == ours else f"it has other classes than {train!r}"

    layout = find_layout(
        data, present, root, exists=lambda split: (root / split).is_dir(), misfit=misfit, flat=True
    )
    if layout.train == HERE:
        for one in present:
            inner = class_folders(root / one).names
            if len(inner) > 1 and all(map(is_split_word, inner)):
                raise DataError(
                    f"data.root: {root} has no split; its folder {one!r} has: --set data.root={root / one}"
                )
    if not present and not (root / layout.train).is_dir():
        raise no_class_folders(root)
    return layout


def _at(files: Sequence[str], labels: Tensor, chosen: Tensor) -> tuple[list[str], Tensor]:
    """The files and labels where the bool tensor ``chosen`` (N,) is true."""
    return [files[row] for row in chosen.nonzero().flatten().tolist()], labels[chosen]
