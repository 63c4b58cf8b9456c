"""Mixed precision: what is computed in 16 bits while training. Evaluation stays in float32."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Literal

import torch

from qat.errors import RecipeError

Precision = Literal["float32", "bfloat16", "float16"]
_X86: Final = ("x86_64", "amd64", "i386", "i686")
_TYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Around forward and loss: torch computes matrix products in ``precision`` there."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_TYPES[precision])


def gradient_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler | None:
    """Keeps small gradients from vanishing in float16; ``None`` for types that have the range of float32."""
    return torch.amp.GradScaler(device.type) if precision == "float16" else None


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse what ``device`` can't compute.

    Raises:
        RecipeError: float16 without CUDA, or bfloat16 on a GPU without it.
    """
    if precision == "float16" and device.type != "cuda":
        raise RecipeError(
            f"precision: 'float16' needs CUDA, the device is {device.type!r}; allowed there: 'float32', "
            "'bfloat16'"
        )
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise RecipeError("precision: this GPU has no 'bfloat16'; allowed: 'float32', 'float16'")


def emulation(precision: Precision, device: torch.device) -> str | None:
    """A warning where ``device`` has no instructions for ``precision``, so that it saves no time.

    x86 processors without AVX-512 are meant, where torch takes products of bfloat16 apart: a training step
    took 16 times as long as in float32 (docs/LOG.md, 2026-11-29).
    """
    if precision != "bfloat16" or device.type != "cpu" or platform.machine().lower() not in _X86:
        return None
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return None
    return (
        "precision: this processor has no AVX-512, without which 'bfloat16' is many times slower than "
        "'float32'; --set precision=float32"
    )
