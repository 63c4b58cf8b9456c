"""Activation quantizers for tests, and values for them."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.quantize.activation_quantizers import ActivationQuantizer
from qat.quantize.observers import Observer


def calibrated(
    x: Tensor, bits: int = 8, signed: bool = True, observer: Observer = "minmax"
) -> ActivationQuantizer:
    """A quantizer that was calibrated with ``x``, in evaluation mode."""
    point = ActivationQuantizer(bits, signed, observer).eval()
    point.start_calibration()
    point(x)
    point.finish_calibration()
    return point


def state_of(point: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in point.state_dict().items()}


def same_state(point: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    after = point.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
