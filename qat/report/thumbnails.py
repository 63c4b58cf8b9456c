"""Small pictures inside a page, as PNG data URIs whose total size is bounded."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image
from torch import Tensor

#: Longest sides in pixels, tried from the largest on until all pictures fit.
_SIDES: Final = (160, 128, 96, 64, 48, 32)
#: Side in pixels below which the browser enlarges a picture, without smoothing.
_TINY: Final = 64


@dataclass(frozen=True)
class Thumbnail:
    """A picture: its data URI, and its width and height in pixels."""

    uri: str
    width: int
    height: int

    @property
    def tiny(self) -> bool:
        """Whether the picture is so small that the browser enlarges it."""
        return max(self.width, self.height) < _TINY


def thumbnails(images: Sequence[Tensor], most_bytes: int) -> list[Thumbnail]:
    """Pictures of uint8 images (3, H, W) that take at most ``most_bytes`` together.

    If needed, all are shrunk to the same longest side. If they don't fit even at 32 pixels, only the first
    ones that fit are returned.
    """
    found: list[Thumbnail] = []
    for side in _SIDES:
        found = [_thumbnail(image, side) for image in images]
        if sum(len(one.uri) for one in found) <= most_bytes:
            return found
    while sum(len(one.uri) for one in found) > most_bytes:
        found.pop()
    return found


def _thumbnail(image: Tensor, side: int) -> Thumbnail:
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    # A grey image has three equal channels; as one channel it takes less space.
    grey = bool((pixels == pixels[..., :1]).all())
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    code = base64.b64encode(file.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/png;base64,{code}", picture.width, picture.height)
