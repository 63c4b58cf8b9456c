"""Describes in words what is wrong with a tensor that is written to a checkpoint or read from one."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

#: Most keys that a message lists; it gives the number of the others.
_SHOWN: Final = 10


def not_finite(key: str, value: Tensor, in_float_network: bool) -> str:
    """A message if ``value`` holds NaN or an infinity, else an empty string.

    Infinities are allowed in the minimum and maximum of an observer, which is ±∞ before it saw any values.

    Args:
        key: key of the tensor in the state dict.
        value: any shape and type.
        in_float_network: whether the key belongs to the float network, and not to a quantizer.
    """
    if not value.is_floating_point() or not value.numel():
        return ""
    # Both results are NaN if any value is. This takes one pass and is much faster than torch.isfinite.
    low, high = (float(end) for end in torch.aminmax(value))
    if math.isnan(low):
        return "holds NaN"
    nothing_seen = not in_float_network and key.endswith((".min_val", ".max_val"))
    return "" if nothing_seen or (math.isfinite(low) and math.isfinite(high)) else "holds an infinity"


def has_negative_variance(key: str, value: Tensor) -> bool:
    """Whether it is the variance that a normalization divides by the root of, and holds one below 0."""
    return key.endswith(".running_var") and bool((value < 0).any())


def overflow(key: str, value: Tensor, dtype: torch.dtype, in_float_network: bool) -> str:
    """A message if a finite value of ``value`` becomes infinite in type ``dtype``, else an empty string.

    The arguments ``key`` and ``in_float_network`` are those of :func:`not_finite`.
    """
    if value.dtype == dtype or not dtype.is_floating_point:
        return ""
    if not not_finite(key, value.to(dtype), in_float_network):
        return ""
    return f"a value of {float(value.abs().max()):g} does not fit {dtype_name(dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type for messages, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def listed(keys: list[str]) -> str:
    """The first ten of ``keys`` and the number of the others, as text that is safe to print."""
    rest = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    # Keys come from files, so characters that could control the terminal are escaped.
    return ", ".join(key if key.isprintable() else ascii(key) for key in keys[:_SHOWN]) + rest
