"""Pixels are normalized channel by channel, onto an image grid that covers all of them."""

from typing import Any

import numpy as np
import pytest
import torch

from qat.data.augment import normalize
from qat.quantize.image_grid import image_grid

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_normalize_is_the_formula_per_channel() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    result = normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    expected = (images[:, 1].double() / 255 - 0.456) / 0.224
    torch.testing.assert_close(result[:, 1].double(), expected, rtol=0, atol=1e-6)
    assert normalize(images, IMAGENET_MEAN, IMAGENET_STD, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(normalize(images.float() / 255, IMAGENET_MEAN, IMAGENET_STD), result)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (IMAGENET_MEAN, IMAGENET_STD),
        ((0.0,) * 3, (1.0,) * 3),
        ((0.5,) * 3, (0.5,) * 3),
        ((-1.0,) * 3, (1.0,) * 3),
        ((2.0,) * 3, (0.5,) * 3),
    ],
)
def test_the_image_grid_covers_every_pixel_value_and_zero(mean: Any, std: Any) -> None:
    scale, zero_point = image_grid(mean, std)
    assert 0 <= zero_point <= 255
    assert scale == float(np.float32(scale))
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    values = normalize(pixels, mean, std)
    steps = values / scale + zero_point
    assert steps.min() >= -0.001  # only rounding in float32: no value saturates
    assert steps.max() <= 255.001
    # Nearly all of the 256 integers are used: the grid is wider than the pixels by one step at most.
    low, high = min(0.0, values.min().item()), max(0.0, values.max().item())
    assert high - low <= 255 * scale * (1 + 1e-6) <= high - low + scale * (1 + 1e-3)


def test_the_image_grid_of_raw_pixels_is_the_pixel_grid() -> None:
    assert image_grid((0.0,) * 3, (1.0,) * 3) == (float(np.float32(1 / 255)), 0)
