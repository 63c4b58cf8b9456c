"""What a network knows about its images and classes; its arithmetic does not depend on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qat.errors import QuantizationError
from qat.recipe.schema import Recipe

#: One number for each channel: red, green, blue.
PerChannel = tuple[float, float, float]


@dataclass(frozen=True)
class Facts:
    """Facts that come with a checkpoint, and that an export writes into the model's metadata.

    Attributes:
        mean, std: normalization ``(x − mean) / std`` of pixels in 0 to 1; ``None`` where it isn't known.
        image_size: side of the square images, in pixels; ``None`` where it isn't known.
        class_names: in the order of the logits; empty where they aren't known.
        recipe: of the run that trained the network; ``None`` where no run did.
    """

    mean: PerChannel | None = None
    std: PerChannel | None = None
    image_size: int | None = None
    class_names: tuple[str, ...] = ()
    recipe: Recipe | None = None


def per_channel(values: Sequence[float], name: str, *, positive: bool = False) -> PerChannel:
    """Three finite numbers.

    Args:
        values: one for each channel.
        name: for the message.
        positive: whether each has to be above 0.

    Raises:
        QuantizationError: it is something else.
    """
    what = "three positive numbers" if positive else "three numbers"
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise QuantizationError(f"{name}: found {values!r}, allowed: {what}, one per channel") from error
    if len(found) != 3 or not all(map(math.isfinite, found)) or (positive and min(found) <= 0):
        raise QuantizationError(f"{name}: found {list(found)}, allowed: {what}, one per channel")
    return found
