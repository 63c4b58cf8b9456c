"""Raw pixels: the normalization and the image grid as one multiplication and one addition per channel."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from qat.errors import QuantizationError
from qat_export.integer.network import IntegerNetwork

_PIXELS: Final = np.arange(256, dtype=np.float32)


def pixel_table(network: IntegerNetwork) -> NDArray[np.uint8]:
    """Integer on the image grid of every value of a raw pixel, (3, 256).

    ``clamp(rint(normalize(p) / scale) + zero_point)`` with ``normalize(p) = (p / 255 - mean) / std``, each
    operation in float32: what a float image goes through.
    """
    grid = network.stem.image
    mean, std = (np.array(values, np.float32)[:, None] for values in (network.mean, network.std))
    normalized = (_PIXELS / np.float32(255) - mean) / std
    integers = np.rint(normalized / np.float32(grid.scale)) + grid.zero_point
    table: NDArray[np.uint8] = np.clip(integers, grid.low, grid.high).astype(np.uint8)
    return table


def fold_normalization(network: IntegerNetwork) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gain and offset (3,) such that ``clamp(rint(p * gain + offset) + zero_point)`` is :func:`pixel_table`.

    Both operations are in float32, and every one of the 3 · 256 results is checked. The offset is the middle
    of the interval that rounds all pixels alike.

    Raises:
        QuantizationError: no such numbers: rounding in the normalization itself is visible on this grid.
    """
    grid, table = network.stem.image, pixel_table(network)
    gain = 1 / (255 * np.array(network.std, np.float64) * np.float32(grid.scale))
    gains, offsets = gain.astype(np.float32), np.empty(3, np.float32)
    for channel in range(3):
        steps = table[channel].astype(np.float64) - grid.zero_point
        products = (_PIXELS * gains[channel]).astype(np.float64)
        low, high = steps - 0.5 - products, steps + 0.5 - products
        # At an end of the grid one side has no bound: whatever lies beyond is saturated to the same integer.
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
