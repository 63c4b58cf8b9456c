"""Quantizers of weights: one grid per output channel, whose scale follows from the weights themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.quantize.integers import saturate
from qat.quantize.observers import channel_scales
from qat.quantize.quantizer_base import QuantizerState, power_of_two_above


class WeightQuantizer(QuantizerState):
    """Symmetric fake quantization of weights, with one scale per output channel.

    The scales are computed from the weights in every forward pass, so that there is nothing to calibrate and
    no state. An output channel whose weights are all zero gets a tiny positive scale, and stays zero.

    Args:
        bits: width of the integers, 2 to 8; they lie in ``±(2**(bits - 1) - 1)``.
        power_of_two: whether each scale is rounded up to a power of two.
        rows: number of output channels of each layer that it quantizes. Only learned scales use it.
    """

    def __init__(self, bits: int = 8, power_of_two: bool = False, rows: Sequence[int] = ()) -> None:
        """Store the settings."""
        super().__init__()
        self.bits, self.quant_max, self.power_of_two = bits, 2 ** (bits - 1) - 1, power_of_two

    def scale(self, weight: Tensor) -> Tensor:
        """The scale of each output channel of ``weight`` (O, ...), float32 (O,)."""
        scale = channel_scales(weight, self.quant_max)
        return power_of_two_above(scale) if self.power_of_two else scale

    def freeze(self) -> None:
        """Fix learned scales from here on. This class learns none, so nothing happens."""

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The integers of ``weight`` (O, ...) in float32, and each output channel's scale, float64 (O,)."""
        scale = self.scale(weight).double()
        steps = weight.detach().double() / scale.view(-1, *[1] * (weight.ndim - 1))
        return saturate(steps, -self.quant_max, self.quant_max).float(), scale

    def forward(self, weight: Tensor) -> Tensor:
        """Put ``weight`` (O, ...) on the grid of each output channel; the shape stays."""
        scale = self.scale(weight)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -self.quant_max, self.quant_max)

    def describe(self) -> dict[str, object]:
        """The entry in the quantization map: type and granularity."""
        return {"type": f"int{self.bits}", "range": "weights", "granularity": "per output channel"}
