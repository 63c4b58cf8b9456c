"""The grid of the network's input, computed from the normalization of the images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def image_grid(mean: Sequence[float], std: Sequence[float]) -> tuple[float, int]:
    """Scale and zero point of the uint8 grid ``x ≈ scale · (q − zero_point)`` of normalized images.

    The grid holds 0 exactly, and its range holds every value that a normalized pixel can take, from
    ``lo = min(0, min_c −mean_c/std_c)`` to ``hi = max(0, max_c (1 − mean_c)/std_c)``. The scale, a float32
    number, is the smallest possible: ``max(−lo/zero_point, hi/(255 − zero_point))``, with the zero point that
    makes it smaller of the two integers next to ``255 · −lo/(hi − lo)``. It depends on the normalization
    alone, so the input needs no observer.

    Args:
        mean, std: normalization ``(x − mean_c) / std_c`` of pixels in 0 to 1, for each channel c.
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
