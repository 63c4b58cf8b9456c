"""Which BNext a state dict belongs to, and which keys and shapes a BNext's state dict has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from qat.errors import CheckpointError, QuantizationError
from qat.models.bnext import Architecture, BNext


def infer_architecture(
    state: Mapping[str, Tensor], stem_stride: int | None = None, num_classes: int | None = None
) -> Architecture:
    """The architecture that a state dict belongs to, found from its keys and shapes.

    Args:
        state: tensors by key, without the prefix ``module.``. Keys of quantizers are ignored.
        stem_stride: stride of the stem, which keys and shapes don't show. ``None`` means 2 if there are 1000
            classes, else 1.
        num_classes: taken where the state has no classifier, which is refused by default.

    Raises:
        CheckpointError: no BNext has these keys. The message names a key that is missing or contradicts the
            others.
    """

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        if key not in state:
            raise CheckpointError(f"not a BNext: key {key!r} is missing")
        if state[key].ndim != ndim:
            raise CheckpointError(
                f"not a BNext: {key}: shape {list(state[key].shape)}, expected {ndim} sides"
            )
        return tuple(state[key].shape)

    widths = [shape("feature.0.conv1.weight", 4)[0]]
    numbers = {int(found[1]) for key in state if (found := re.match(r"feature\.(\d{1,4})\.", key))}
    elm_attention = "feature.1.FFN_3x3.binary_conv.weight" not in state
    spatial = "Attention" if elm_attention else "FFN_3x3"
    for i in range(1, max(max(numbers), 1) + 1):
        key = f"feature.{i}.{spatial}.binary_conv.weight"
        channels = shape(key, 4)[0]
        if channels != widths[-1]:
            raise CheckpointError(f"not a BNext: {key}: {channels} channels after a width of {widths[-1]}")
        doubles = any(key.startswith((f"feature.{i}.FFN_1.", f"feature.{i}.FFN_2.")) for key in state)
        for name in ("FFN_1", "FFN_2") if doubles else ("FFN",):
            shape(f"feature.{i}.{name}.binary_conv.weight", 4)
        widths.append(2 * channels if doubles else channels)
    if num_classes is None or has_classifier(state):
        num_classes = shape("fc.weight", 2)[0]
    try:
        return Architecture.of(
            num_classes=num_classes,
            widths=widths,
            stem_stride=stem_stride,
            elm_attention=elm_attention,
            infor_recoupling=any(".se.se.1." in key for key in state),
        )
    except QuantizationError as error:
        raise CheckpointError(f"not a BNext: {error}") from error


def has_classifier(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has a classifier; that of a backbone hasn't."""
    return any(key.startswith("fc.") for key in state)


@lru_cache(maxsize=8)
def float_shapes(architecture: Architecture) -> Mapping[str, torch.Size]:
    """Shape of each tensor in the state dict of a float network, by key.

    Keys of a prepared network that are not among these belong to quantizers.
    """
    with torch.device("meta"):
        state: dict[str, Tensor] = BNext.from_architecture(architecture).state_dict()
    return {key: value.shape for key, value in state.items()}
