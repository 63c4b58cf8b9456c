"""Mixed precision: matrix products in 16 bits while training. Evaluation is always in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final, Literal

import torch

from qat.errors import RecipeError
from qat.ops.bfloat16 import emulated_autocast, is_emulated

Precision = Literal["float32", "bfloat16", "float16"]
_TYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Context for the forward pass and the loss, in which matrix products have the given precision.

    On a processor without instructions for bfloat16, :mod:`qat.ops.bfloat16` computes its products.
    """
    if precision == "float32":
        return nullcontext()
    if is_emulated(device, _TYPES[precision]):
        return emulated_autocast()
    return torch.autocast(device.type, dtype=_TYPES[precision])


def gradient_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """A gradient scaler. It keeps small gradients from vanishing in float16, and is off for other types."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def check_precision(precision: Precision, device: torch.device) -> None:
    """Check that ``device`` supports ``precision``.

    Raises:
        RecipeError: float16 is asked for without CUDA, or bfloat16 on a GPU that lacks it.
    """
    if precision == "float16" and device.type != "cuda":
        raise RecipeError(
            f"precision: 'float16' needs CUDA, the device is {device.type!r}; allowed there: 'float32', "
            "'bfloat16'"
        )
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise RecipeError("precision: this GPU has no 'bfloat16'; allowed: 'float32', 'float16'")


def saves_no_time(precision: Precision, device: torch.device) -> str | None:
    """A warning if ``device`` has no instructions for ``precision`` and so saves no time, or ``None``."""
    if precision == "float32" or not is_emulated(device, _TYPES[precision]):
        return None
    return (
        "precision: this processor has no instructions for 'bfloat16', whose products are computed in "
        "float32: it saves some memory, but no time; --set precision=float32 is more precise"
    )
