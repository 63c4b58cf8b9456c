"""Folders ``ROOT/SPLIT/CLASS/image`` as a data set: listed at once, decoded batch by batch."""

from __future__ import annotations

import glob
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.errors import DataError, nearest
from qat.recipe import Data
from qat.split import Split, SplitName

__all__ = ["FolderSplit", "decode", "load_folder_split"]


class FolderSplit(Split):
    """Images ``folder/CLASS/file``, decoded when a batch asks for them."""

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
        self.folder = folder
        self.resize = resize
        self.side = side
        self.workers = workers
        # One buffer of bytes: a list of a million strings would be copied into every forked worker as soon
        # as its reference counts change.
        self._files = np.array([os.fsencode(file) for file in files])

    def fingerprint(self) -> str:
        """SHA-256 over relative file names, sizes in bytes and labels; it does not read the images."""
        digest = hashlib.sha256()
        for file, label in zip(self._files, self.labels.tolist(), strict=True):
            path = self.folder / os.fsdecode(file)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from error
            digest.update(Path(os.fsdecode(file)).as_posix().encode(errors="surrogateescape"))
            digest.update(f"\0{size}\0{label}\n".encode())
        return digest.hexdigest()

    def content_fingerprint(self) -> str:
        """SHA-256 over the SHA-256 of each file's bytes and its label, in order; names don't count.

        Raises:
            DataError: a file cannot be read.
        """
        digest = hashlib.sha256()
        for file, label in zip(self._files, self.labels.tolist(), strict=True):
            path = self.folder / os.fsdecode(file)
            try:
                with path.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from error
            digest.update(struct.pack("<q", label))
        return digest.hexdigest()

    def _load(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[Tensor | DataError] = DataLoader(
            _Decoder(self.folder, self._files, self.resize, self.side),
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=self.workers,
            collate_fn=_stack,
            generator=torch.Generator(),  # else starting the loader draws from the global generator
        )
        for indices, images in zip(batches, loader, strict=True):
            if isinstance(images, DataError):
                raise images
            yield images, self.labels[indices]


class _Decoder(Dataset["Tensor | DataError"]):
    """What a worker process needs to decode an image."""

    def __init__(
        self, folder: Path, files: np.ndarray[tuple[int], np.dtype[np.bytes_]], resize: int, side: int
    ):
        self.folder, self.files, self.resize, self.side = folder, files, resize, side

    def __getitem__(self, index: int) -> Tensor | DataError:
        # The error is returned: raised in a worker, it would reach the user wrapped in a traceback.
        try:
            return decode(self.folder / os.fsdecode(self.files[index]), self.resize, self.side)
        except DataError as error:
            return error


def _stack(images: list[Tensor | DataError]) -> Tensor | DataError:
    tensors: list[Tensor] = []
    for image in images:
        if isinstance(image, DataError):
            return image
        tensors.append(image)
    return torch.stack(tensors)


def decode(path: Path, resize: int, side: int) -> Tensor:
    """Read an image as uint8 (3, side, side): shorter side to ``resize`` (bilinear), then centre crop.

    Any mode becomes RGB as ImageNet evaluations do it: greyscale is repeated, transparency dropped, and
    an orientation tag ignored. Raises ``DataError`` naming the file.
    """
    try:
        with Image.open(path) as opened:
            image = _rgb(opened)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        # Pillow's OSErrors for broken files often repeat the path; the reason is what is missing here.
        reason = str(error).replace(str(path), path.name) or type(error).__name__
        raise DataError(f"{path}: cannot be decoded: {reason}") from error
    width, height = image.size
    shorter = min(width, height)
    width, height = resize * width // shorter, resize * height // shorter
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.array(image.crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip 16-bit greyscale at 255, which turns nearly every such image white.
        values = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(values.astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating point pixels have no defined range; convert the image to 8 bits")
    elif "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about palettes with transparency
    return image.convert("RGB")


def load_folder_split(data: Data, name: SplitName) -> FolderSplit:
    """List the images of one split of ``data.root``; see `qat.data.load_split` for sizes and errors."""
    if data.root is None:
        raise DataError("data.root is unset: name the folder of images with --set data.root=DIR")
    root = Path(data.root).expanduser().absolute()
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data.root: {root} {found}; name another with --set data.root=DIR")
    resize = data.resize if data.resize is not None else round(data.image_size * 8 / 7)
    if resize < data.image_size:
        raise DataError(f"data.resize: {resize} is smaller than data.image_size, {data.image_size}")

    key, split = ("train_split", data.train_split) if name == "train" else ("test_split", data.test_split)
    folder = root / split
    if not folder.is_dir():
        present = _folders(root)
        listed = ", ".join(present) or "no folders"
        raise DataError(
            f"data.{key}: {root} has no folder {split!r}{nearest(split, present)}; it has {listed}"
        )
    classes = _folders(folder)
    other = root / (data.test_split if name == "train" else data.train_split)
    if other.is_dir() and (difference := sorted(set(classes) ^ set(_folders(other)))):
        one = difference[0]
        where, missing = (folder, other) if one in classes else (other, folder)
        raise DataError(
            f"{root}: {folder.name!r} and {other.name!r} must have the same classes, but {len(difference)} "
            f"differ, among them {one!r}, which is in {where.name!r} and not in {missing.name!r}"
        )
    files, labels = _labelled_files(folder, classes)
    side = resize if name == "train" and data.augment.crop is not None else data.image_size
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
            with _quiet_and_offline():
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


@contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """No progress bars, and no request to Hugging Face's download counter, which ``load_dataset`` makes."""
    import datasets

    bars, counts = not datasets.are_progress_bars_disabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if bars:
            datasets.enable_progress_bars()
