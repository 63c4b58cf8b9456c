"""The grid of the image: known from the normalization, so that the input needs no observer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def image_grid(mean: Sequence[float], std: Sequence[float]) -> tuple[float, int]:
    """The uint8 grid ``x ≈ scale · (q − zero_point)`` over every normalized pixel value and zero.

    ``lo = min(0, min_c −mean_c/std_c)``, ``hi = max(0, max_c (1 − mean_c)/std_c)``. The scale is the smallest
    (a float32 value) at which 0 and the whole range are on the grid: of both integers next to
    ``255 · −lo/(hi − lo)``, the zero point that needs the smaller ``max(−lo/zero_point,
    hi/(255 − zero_point))``. It depends on the normalization alone, so the input needs no observer.
    """
    low = min(0.0, *((0.0 - m) / s for m, s in zip(mean, std, strict=True)))
    high = max(0.0, *((1.0 - m) / s for m, s in zip(mean, std, strict=True)))
    exact = 255 * -low / (high - low)
    candidates = []
    for zero_point in {math.floor(exact), math.ceil(exact)}:
        below = -low / zero_point if zero_point else (math.inf if low else 0.0)
        above = high / (255 - zero_point) if zero_point < 255 else (math.inf if high else 0.0)
        candidates.append((max(below, above), zero_point))
    scale, zero_point = min(candidates)
    return float(np.float32(scale)), zero_point
