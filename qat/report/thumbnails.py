"""Small pictures inside a page: PNG data URIs that together keep below a size."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image
from torch import Tensor

#: Sides that are tried, in pixels, until all pictures fit.
_SIDES: Final = (160, 128, 96, 64, 48, 32)
#: Pictures with shorter sides are enlarged by the browser, pixel by pixel.
_TINY: Final = 64


@dataclass(frozen=True)
class Thumbnail:
    """A picture: its data URI, width and height in pixels, and whether it has few of them."""

    uri: str
    width: int
    height: int

    @property
    def tiny(self) -> bool:
        """Whether single pixels show."""
        return max(self.width, self.height) < _TINY


def thumbnails(images: Sequence[Tensor], most_bytes: int) -> list[Thumbnail]:
    """The uint8 images (3, H, W) as pictures of at most ``most_bytes`` together.

    They are shrunk where they must be, all to the same longest side. Where even 32 pixels are too many, the
    first ones that fit are returned.
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
    # Grey images come with three equal channels.
    grey = bool((pixels == pixels[..., :1]).all())
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    code = base64.b64encode(file.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/png;base64,{code}", picture.width, picture.height)
