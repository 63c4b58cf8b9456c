"""What every exported model says about itself: input and output, metadata properties."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final, Literal, get_args

#: Names of input and output: images (batch, 3, S, S) or (batch, S, S, 3), and logits (batch, classes).
INPUT: Final = "image"
OUTPUT: Final = "logits"
#: Values of the metadata property ``input``: normalized images, or raw pixels, which the model normalizes.
InputKind = Literal["float32 NCHW", "uint8 NCHW", "uint8 NHWC"]


def kind_of_input(pixel_type: str, layout: str) -> InputKind:
    """The kind of input with this type ("float32", "uint8") and layout ("NCHW", "NHWC").

    Raises:
        ValueError: no model takes such images.
    """
    kinds: tuple[InputKind, ...] = get_args(InputKind)
    for kind in kinds:
        if kind.split() == [pixel_type, layout]:
            return kind
    raise ValueError(f"no input of type {pixel_type} and layout {layout}")


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
    """Metadata properties of a model. All values are texts; lists and objects are written as JSON.

    Args:
        model_format: ``bnext-qat``, name of the target, version of its layout.
        architecture: description of the network, one line of text.
        class_names: names in the order of the logits.
        mean, std: normalization of the images, per channel.
        image_size: side of the images in pixels.
        facts: further properties; those made from the other arguments replace any of the same name.
    """
    return dict(facts) | {
        "format": model_format,
        "architecture": architecture,
        "class_names": json.dumps(list(class_names)),
        "normalization": json.dumps({"mean": list(mean), "std": list(std)}),
        "image_size": str(image_size),
    }
