"""A share of each class's images as validation split, for data sets that have none."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qat.data.listing import same_name
from qat.errors import DataError

__all__ = ["held_out", "held_out_note"]


def held_out(names: Sequence[str], labels: Tensor, share: float, source: object) -> Tensor:
    """Which images are held out: bool (N,).

    Of a class of n images it is the nearest integer to ``share``·n, but at least one, and one is left for
    training; of a single image nothing. Which ones depends on the SHA-256 of their names alone: not on a
    seed, not on their order, not on the images of other classes.

    Args:
        names: of N images, relative to the data set.
        labels: int64 (N,).
        share: above 0, below 1.
        source: what an error calls the data set.

    Raises:
        DataError: no class has two images.
    """
    order = sorted(range(len(names)), key=lambda row: _number(names[row]))
    rows: dict[int, list[int]] = {}
    values = labels.tolist()
    for row in order:
        rows.setdefault(values[row], []).append(row)
    chosen = torch.zeros(len(names), dtype=torch.bool)
    for of_class in rows.values():
        count = min(max(1, math.floor(share * len(of_class) + 0.5)), len(of_class) - 1)
        chosen[of_class[:count]] = True
    if not chosen.any():
        raise DataError(
            f"{source}: no class has more than one image, so there is none to hold out for validation; add "
            "images, or a folder 'validation'"
        )
    return chosen


def held_out_note(chosen: Tensor, share: float) -> str:
    """A sentence on what :func:`held_out` chose."""
    return (
        f"validation: {int(chosen.sum())} of {len(chosen)} images are held out of training, "
        f"{100 * share:.4g} % of each class (data.validation_share)"
    )


def _number(name: str) -> bytes:
    return hashlib.sha256(same_name(name).encode(errors="surrogateescape")).digest()
