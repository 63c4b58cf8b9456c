"""Pictures inside a page: what they show, and that they fit."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qat.report.thumbnails import Thumbnail, thumbnails


def noise(side: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, side, side), generator=random, dtype=torch.uint8)


def decoded(one: Thumbnail) -> Image.Image:
    head, code = one.uri.split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(code)))


def test_a_small_image_is_kept_pixel_by_pixel() -> None:
    (found,) = thumbnails([noise(16)], 10_000)
    assert (found.width, found.height, found.tiny) == (16, 16, True)
    assert np.array_equal(np.asarray(decoded(found)), noise(16).permute(1, 2, 0).numpy())


def test_an_image_of_equal_channels_is_stored_in_grey() -> None:
    grey = noise(16)[:1].repeat(3, 1, 1)
    (found,) = thumbnails([grey], 10_000)
    assert decoded(found).mode == "L"
    assert np.array_equal(np.asarray(decoded(found)), grey[0].numpy())


def test_pictures_are_shrunk_until_they_fit() -> None:
    images = [noise(224, seed) for seed in range(4)]
    large, small = thumbnails(images, 10_000_000), thumbnails(images, 100_000)
    assert {one.width for one in large} == {160}
    assert not large[0].tiny
    assert len(small) == 4
    assert sum(len(one.uri) for one in small) <= 100_000
    assert {one.width for one in small} == {64}


def test_a_picture_keeps_its_proportions() -> None:
    (found,) = thumbnails([noise(224)[:, :112]], 10_000_000)
    assert (found.width, found.height) == (160, 80)


def test_where_even_the_smallest_are_too_many_the_first_are_shown() -> None:
    found = thumbnails([noise(64, seed) for seed in range(5)], 12_000)
    assert 0 < len(found) < 5
    assert sum(len(one.uri) for one in found) <= 12_000


def test_no_images_are_no_pictures() -> None:
    assert thumbnails([], 0) == []
