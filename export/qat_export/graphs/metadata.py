"""What every exported model says about itself: names of input and output, metadata properties."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

#: Images (batch, 3, S, S) or (batch, S, S, 3), and logits (batch, classes).
INPUT: Final = "image"
OUTPUT: Final = "logits"


def model_metadata(
    model_format: str,
    *,
    architecture: str,
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    facts: Mapping[str, str],
) -> dict[str, str]:
    """Metadata properties of a model: all values are text, lists and objects are JSON.

    Args:
        model_format: ``bnext-qat``, the target's name and the version of its layout.
        architecture: one line of text.
        class_names: in the order of the logits.
        mean, std: the normalization that the images go through, per channel.
        image_size: side of the images in pixels.
        facts: carried along; the properties above win.
    """
    return dict(facts) | {
        "format": model_format,
        "architecture": architecture,
        "class_names": json.dumps(list(class_names)),
        "normalization": json.dumps({"mean": list(mean), "std": list(std)}),
        "image_size": str(image_size),
    }
