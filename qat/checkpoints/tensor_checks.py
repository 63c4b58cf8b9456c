"""What is wrong with a tensor that is written to a checkpoint or read from one, in words."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

#: Keys shown of each kind in a message; the rest is counted.
_SHOWN: Final = 10


def not_finite(key: str, value: Tensor, in_float_network: bool) -> str:
    """What is wrong with the values, or nothing. (±inf is what an observer holds that saw no tensor yet.)

    Args:
        key: the tensor's in the state dict.
        value: any shape and type.
        in_float_network: whether the float network has this key; quantizers have the others.
    """
    if not value.is_floating_point() or not value.numel():
        return ""
    # Both ends are NaN if anything is. One pass, much faster than torch.isfinite.
    low, high = (float(end) for end in torch.aminmax(value))
    if math.isnan(low):
        return "holds NaN"
    nothing_seen = not in_float_network and key.endswith((".min_val", ".max_val"))
    return "" if nothing_seen or (math.isfinite(low) and math.isfinite(high)) else "holds an infinity"


def has_negative_variance(key: str, value: Tensor) -> bool:
    """Whether it is the variance that a normalization divides by the root of, and holds one below 0."""
    return key.endswith(".running_var") and bool((value < 0).any())


def overflow(key: str, value: Tensor, dtype: torch.dtype, in_float_network: bool) -> str:
    """What is wrong with finite values once they are of type ``dtype``, or nothing."""
    if value.dtype == dtype or not dtype.is_floating_point:
        return ""
    if not not_finite(key, value.to(dtype), in_float_network):
        return ""
    return f"a value of {float(value.abs().max()):g} does not fit {dtype_name(dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` and the like, as a message says it."""
    return str(dtype).removeprefix("torch.")


def listed(keys: list[str]) -> str:
    """The first of ``keys``, safe to print, and how many more there are."""
    rest = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    # Keys come from files: whatever a terminal would act on is escaped.
    return ", ".join(key if key.isprintable() else ascii(key) for key in keys[:_SHOWN]) + rest
