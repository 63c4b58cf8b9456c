"""Checks for fake-quantized networks that can't be lowered; each error names a module.

Some unusual values can be lowered and are not refused: gains of batch normalizations that are zero (the
channel is constant) or negative (the signs of its weights are flipped), variances of zero, slopes of PReLU
that are zero, negative or above 1, and rows of zeros in stem, channel attention and classifier.

A step is the scale of a grid: the difference between the values of two neighbouring integers.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import nn

from qat.checkpoints.tensor_checks import not_finite
from qat.errors import QuantizationError
from qat.nn.layers import BinaryConv2d
from qat.quantize.folding import folded_constants
from qat.quantize.quantizer_base import LARGEST_BITS
from qat.quantize.sub_block import FakeQuantSubBlock

#: Largest step of a grid, and the inverse of the smallest. Within these bounds, the ratio of any two steps is
#: a positive float32 number. Calibration gives no step below 2**-23.
LARGEST_STEP: Final = 2.0**60


def refuse_values(model: nn.Module) -> None:
    """Refuse parameters and buffers that are not finite, and negative variances. Observers are not checked.

    Raises:
        QuantizationError: the message names the state-dict key.
    """
    for name, tensor in model.state_dict().items():
        if "activation_post_process" in name:
            continue
        if problem := not_finite(name, tensor, in_float_network=True):
            raise QuantizationError(f"{name}: {problem}")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise QuantizationError(f"{name}: a variance is negative")


def refuse_weights(conv: BinaryConv2d, name: str) -> None:
    """Refuse a binary convolution that computes with anything but ±1.

    Raises:
        QuantizationError: its temperature is not below 1e-7 yet, or a weight has another magnitude than 1.
    """
    if not conv.is_binary():
        raise QuantizationError(
            f"{name}: temperature {float(conv.temperature):.3g} is not below 1e-7, so the weights in use are "
            "not ±1: train on until the temperature has annealed"
        )
    low, high = (float(end) for end in torch.aminmax(conv.effective_weight().detach().abs()))
    if not low == high == 1.0:
        found = f"magnitudes from {low:.3g} to {high:.3g}"
        raise QuantizationError(f"{name}: the weights in use are not ±1: found {found}")


def refuse_branch(module: FakeQuantSubBlock, name: str) -> None:
    """Refuse a branch with a constant beyond float32: a gain of BN2 is huge, or scales differ too much.

    Args:
        module: a sub-block with a branch, all of whose grids are calibrated.
        name: its module name.

    Raises:
        QuantizationError: the message names BN2 or the sub-block.
    """
    gain, _ = folded_constants(module.norm2)
    largest = float(gain.abs().max())
    # BN1's gain becomes a single multiplier, which `check_network` checks. BN2's gain is divided among
    # several constants, so it is checked here.
    if not largest <= torch.finfo(torch.float32).max:
        raise QuantizationError(f"{name}.norm2: a folded gain of {largest:.3g} is no float32 number")
    steps = {"gain": float(module.gain_step(gain))}
    if module.kind == "scale":
        steps["product"] = float(module.product_step())
    for what, step in steps.items():
        if not 0 < step < math.inf:
            raise QuantizationError(
                f"{name}: the steps of its grids are too far apart: its {what} needs a step of {step:.3g}"
            )


def refuse_step(step: float, name: str) -> None:
    """Refuse a step that is not between the inverse of :data:`LARGEST_STEP` and that number.

    Raises:
        QuantizationError: the message names the quantization point.
    """
    if not 1 / LARGEST_STEP <= step <= LARGEST_STEP:
        raise QuantizationError(
            f"{name}: a step of {step:.3g}, allowed: {1 / LARGEST_STEP:.3g} to {LARGEST_STEP:.3g}"
        )


def refuse_width(bits: int, name: str) -> None:
    """Refuse a grid of more bits than integer networks have.

    Raises:
        QuantizationError: the message names the quantization point.
    """
    if bits > LARGEST_BITS:
        raise QuantizationError(
            f"{name}: {bits} bits are simulated in float; an integer network needs {LARGEST_BITS} or fewer "
            "(quantization.trunk.activation_bits, overrides)"
        )


def left_in_float(name: str) -> str:
    """The message about a module that the recipe left in float."""
    return (
        f"{name}: left in float by the recipe; an integer network needs stem, se, classifier and trunk "
        "enabled everywhere (quantization.*.enabled, include, exclude)"
    )
