"""From encoded images to uint8 pixels: what every data set of files and tables is preprocessed with."""

from __future__ import annotations

import functools
import hashlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.errors import DataError

__all__ = ["Encoded", "content_hash", "decode", "decoded_batches", "formats", "opened_image"]

#: Formats of Pillow's that are not read: EPS starts an interpreter of programs, which any file can be, by
#: whatever name; of the others Pillow knows the header alone.
_NOT_READ: Final = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"})


class Encoded(Protocol):
    """Encoded images by index. Worker processes get a copy."""

    def image(self, index: int) -> Path | bytes:
        """The file of an image, or its content. Raises ``DataError`` where there is none."""

    def name(self, index: int) -> str:
        """What an error calls the image."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NOT_READ)


def decode(
    source: Path | bytes, resize: int, side: int, name: str | None = None, *, turn: bool = False
) -> Tensor:
    """Decode an image as uint8 (3, side, side): shorter side to ``resize`` (bilinear), then centre crop.

    An image whose shorter side is ``resize`` already is not resampled. Any mode becomes RGB as ImageNet
    evaluations do it: greyscale is repeated, transparency dropped, and an orientation tag ignored, unless
    ``turn`` asks for images upright as a viewer shows them.

    Raises:
        DataError: it is no image or a broken one; the message opens with ``name``, by default the file's.
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
            return _rgb(ImageOps.exif_transpose(opened) if turn else opened)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        reason = str(error).replace(repeated, shown).strip() or type(error).__name__
        raise DataError(f"{name or shown or 'image'}: cannot be decoded: {reason}") from error


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
    """Yield the images and labels at each of the index tensors, decoded as they are asked for.

    Args:
        images: N of them.
        labels: int64 (N,).
        batches: indices into both.
        resize, side, turn: see :func:`decode`.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        DataError: an image cannot be decoded.
    """
    loader: DataLoader[Tensor | DataError] = DataLoader(
        _Decoder(images, resize, side, turn),
        batch_sampler=[indices.tolist() for indices in batches],
        num_workers=workers,
        collate_fn=_stack,
        generator=torch.Generator(),  # else starting the loader draws from the global generator
    )
    for indices, found in zip(batches, loader, strict=True):
        if isinstance(found, DataError):
            raise DataError(
                f"{found}; `qat data check` names every such image, --set data.on_error=skip leaves them out"
            ) from found
        yield found, labels[indices]


class _Decoder(Dataset["Tensor | DataError"]):
    """What a worker process needs to decode an image."""

    def __init__(self, images: Encoded, resize: int, side: int, turn: bool) -> None:
        self.images, self.resize, self.side, self.turn = images, resize, side, turn

    def __getitem__(self, index: int) -> Tensor | DataError:
        # The error is returned: raised in a worker, it would reach the user wrapped in a traceback.
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
    # Not by torch, which would start its threads once more in the thread or process that decodes.
    return torch.from_numpy(np.stack(arrays))


def content_hash(images: Encoded, labels: Tensor) -> str:
    """Hexadecimal SHA-256 over the SHA-256 of each encoded image and its label, in order.

    The same images have the same hash as files and in a table.

    Raises:
        DataError: an image cannot be read.
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
