"""Decodes images of files and tables to uint8 pixels, resized and cropped at the centre."""

from __future__ import annotations

import functools
import hashlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.errors import DataError

__all__ = ["Encoded", "content_hash", "decode", "decoded_batches", "formats", "opened_image"]

#: Formats of Pillow's that are not read: EPS starts an interpreter of programs, which any file can be, by
#: whatever name; of the others Pillow knows the header alone.
_NOT_READ: Final = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"})
#: The EXIF tag, and what brings an image upright by its value; 1 is upright.
_ORIENTATION: Final = 0x0112
_TURNS: Final[dict[Any, Image.Transpose]] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Encoded(Protocol):
    """Encoded images by index. It must be possible to pickle it for worker processes."""

    def image(self, index: int) -> Path | bytes:
        """The file of an image, or its encoded bytes.

        Raises:
            DataError: there is no image at ``index``.
        """

    def name(self, index: int) -> str:
        """The name of an image in messages."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NOT_READ)


def decode(
    source: Path | bytes, resize: int, side: int, name: str | None = None, *, turn: bool = False
) -> Tensor:
    """Decode an image, resize its shorter side (bilinear), and crop its centre.

    Every mode becomes RGB as in usual ImageNet evaluations: greyscale is repeated, and transparency is
    dropped.

    Args:
        source: a file, or encoded bytes.
        resize: length of the shorter side in pixels. An image that has it already is not resampled.
        side: height and width of the crop in pixels.
        name: name of the image in messages; by default that of the file.
        turn: whether the image is turned upright first, as its EXIF orientation says.

    Returns:
        uint8 (3, side, side).

    Raises:
        DataError: ``source`` can't be read, is not an image, or is damaged.
    """
    image = opened_image(source, name, turn=turn)
    width, height = image.size
    shorter = min(width, height)
    width, height = resize * width // shorter, resize * height // shorter
    left, top = round((width - side) / 2), round((height - side) / 2)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def opened_image(source: Path | bytes, name: str | None = None, *, turn: bool = False) -> Image.Image:
    """An image in RGB as large as it is stored; see :func:`decode`."""
    # Pillow repeats in its errors what was opened.
    if isinstance(source, Path):
        stream: Path | io.BytesIO = source
        repeated, shown = str(source), source.name
    else:
        stream = io.BytesIO(source)
        repeated, shown = repr(stream), ""
    try:
        with Image.open(stream, formats=formats()) as opened:
            return _rgb(_upright(opened) if turn else opened)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        reason = str(error).replace(repeated, shown).strip() or type(error).__name__
        raise DataError(f"{name or shown or 'image'}: cannot be decoded: {reason}") from error


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says it is to be seen; as it is, where that cannot be read."""
    image.load()  # some formats tell the orientation only then, or are turned by Pillow itself
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # the tags may hold anything; viewers show such an image as it is stored, too
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip 16-bit greyscale at 255, which makes nearly every such image white.
        values = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(values.astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating point pixels have no defined range; convert the image to 8 bits")
    elif "transparency" in image.info:
        image = image.convert(
            "RGBA"
        )  # converting a palette with transparency straight to RGB makes Pillow warn
    return image.convert("RGB")


def decoded_batches(
    images: Encoded,
    labels: Tensor,
    batches: list[Tensor],
    *,
    resize: int,
    side: int,
    workers: int,
    turn: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of decoded images, uint8 (n, 3, side, side), and labels, int64 (n,).

    Args:
        images: N encoded images.
        labels: int64 (N,).
        batches: for each batch its indices into ``images`` and ``labels``, int64 (n,).
        resize, side, turn: see :func:`decode`.
        workers: number of processes that decode; 0 decodes in this process.

    Raises:
        DataError: an image can't be decoded.
    """
    loader: DataLoader[Tensor | DataError] = DataLoader(
        _Decoder(images, resize, side, turn),
        batch_sampler=[indices.tolist() for indices in batches],
        num_workers=workers,
        collate_fn=_stack,
        generator=torch.Generator(),  # otherwise starting the loader draws from the global generator
    )
    for indices, found in zip(batches, loader, strict=True):
        if isinstance(found, DataError):
            raise DataError(
                f"{found}; `qat data check` names every such image, --set data.on_error=skip leaves them out"
            ) from found
        yield found, labels[indices]


class _Decoder(Dataset["Tensor | DataError"]):
    """Decodes an image by its index. It is pickled for worker processes."""

    def __init__(self, images: Encoded, resize: int, side: int, turn: bool) -> None:
        self.images, self.resize, self.side, self.turn = images, resize, side, turn

    def __getitem__(self, index: int) -> Tensor | DataError:
        # The error is returned, because one raised in a worker would reach the user wrapped in a traceback.
        try:
            name = self.images.name(index)
            return decode(self.images.image(index), self.resize, self.side, name, turn=self.turn)
        except DataError as error:
            return error


def _stack(images: list[Tensor | DataError]) -> Tensor | DataError:
    arrays = []
    for image in images:
        if isinstance(image, DataError):
            return image
        arrays.append(image.numpy())
    # NumPy stacks them, because torch would start a pool of threads in the thread or process that decodes.
    return torch.from_numpy(np.stack(arrays))


def content_hash(images: Encoded, labels: Tensor) -> str:
    """SHA-256, in hexadecimal digits, over the SHA-256 of each encoded image and its label, in order.

    Images have the same hash whether they are files or cells of a table.

    Raises:
        DataError: an image can't be read.
    """
    digest = hashlib.sha256()
    for index, label in enumerate(labels.tolist()):
        source = images.image(index)
        if isinstance(source, Path):
            try:
                with source.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
            except OSError as error:
                raise DataError(f"{images.name(index)}: cannot be read: {error.strerror}") from error
        else:
            digest.update(hashlib.sha256(source).digest())
        digest.update(struct.pack("<q", label))
    return digest.hexdigest()
