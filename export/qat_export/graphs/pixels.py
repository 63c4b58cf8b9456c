"""Input of raw pixels: normalization and image grid folded into one multiplication and one addition."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from qat.errors import QuantizationError
from qat_export.integer.network import IntegerNetwork

_PIXELS: Final = np.arange(256, dtype=np.float32)


def pixel_table(network: IntegerNetwork) -> NDArray[np.uint8]:
    """The integer on the image grid for each value p of a raw pixel, by channel: (3, 256) uint8.

    ``clamp(rint(normalize(p) / scale) + zero_point)`` with ``normalize(p) = (p / 255 - mean) / std``. Each
    operation is in float32, as for an image that is normalized before it is fed to the model.
    """
    grid = network.stem.image
    mean, std = (np.array(values, np.float32)[:, None] for values in (network.mean, network.std))
    normalized = (_PIXELS / np.float32(255) - mean) / std
    integers = np.rint(normalized / np.float32(grid.scale)) + grid.zero_point
    table: NDArray[np.uint8] = np.clip(integers, grid.low, grid.high).astype(np.uint8)
    return table


def fold_normalization(network: IntegerNetwork) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gain and offset (3,) such that ``clamp(rint(p * gain + offset) + zero_point)`` is :func:`pixel_table`.

    Both operations are in float32. Every one of the 3 · 256 results is checked. The offset is the middle of
    the interval of offsets with which all pixels are rounded as in the table.

    Raises:
        QuantizationError: there are no such numbers, since on this grid the table depends on rounding inside
            of the normalization.
    """
    grid, table = network.stem.image, pixel_table(network)
    gain = 1 / (255 * np.array(network.std, np.float64) * np.float32(grid.scale))
    gains, offsets = gain.astype(np.float32), np.empty(3, np.float32)
    for channel in range(3):
        steps = table[channel].astype(np.float64) - grid.zero_point
        products = (_PIXELS * gains[channel]).astype(np.float64)
        low, high = steps - 0.5 - products, steps + 0.5 - products
        # Pixels at an end of the grid bound the offset from one side only: what lies beyond is saturated.
        lower = low[table[channel] > grid.low].max(initial=-np.inf)
        upper = high[table[channel] < grid.high].min(initial=np.inf)
        offsets[channel] = (lower + upper) / 2
        shifted = _PIXELS * gains[channel] + offsets[channel]
        found = np.clip(np.rint(shifted) + grid.zero_point, grid.low, grid.high)
        if not np.array_equal(found, table[channel]):
            raise QuantizationError(
                f"normalization of channel {channel} (mean {network.mean[channel]:g}, std "
                f"{network.std[channel]:g}) can't be folded into raw pixels exactly: export for float32 input"
            )
    return gains, offsets
