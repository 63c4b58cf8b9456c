"""Quantizers of weights: one grid per output channel, whose scale follows from the weights themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.quantize.integers import saturate
from qat.quantize.observers import channel_scales
from qat.quantize.quantizer_base import QuantizerState, power_of_two_above


class WeightQuantizer(QuantizerState):
    """Symmetric fake quantization of weights, one scale per output channel, taken from the weights.

    The range is the weights' own at every forward, so there is nothing to calibrate and no state. A row of
    zeros keeps a tiny positive scale and stays zero.

    Args:
        bits: 2 to 8; integers lie in ``±(2**(bits - 1) - 1)``.
        power_of_two: round each scale up to the next power of two.
        rows: output channels of each layer that it quantizes, which only learned scales need to know.
    """

    def __init__(self, bits: int = 8, power_of_two: bool = False, rows: Sequence[int] = ()) -> None:
        """Take the width; there is nothing else to set."""
        super().__init__()
        self.bits, self.quant_max, self.power_of_two = bits, 2 ** (bits - 1) - 1, power_of_two

    def scale(self, weight: Tensor) -> Tensor:
        """Scale of each output channel of ``weight`` (O, ...): (O,) float32."""
        scale = channel_scales(weight, self.quant_max)
        return power_of_two_above(scale) if self.power_of_two else scale

    def freeze(self) -> None:
        """Fix what is learned of the grid from here on; here that is nothing."""

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integer weights (O, ...) in float32, and the scale of each output channel (O,) in float64."""
        scale = self.scale(weight).double()
        steps = weight.detach().double() / scale.view(-1, *[1] * (weight.ndim - 1))
        return saturate(steps, -self.quant_max, self.quant_max).float(), scale

    def forward(self, weight: Tensor) -> Tensor:
        """(O, ...) → same shape, on the grid of each output channel."""
        scale = self.scale(weight)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -self.quant_max, self.quant_max)

    def describe(self) -> dict[str, object]:
        """Type and granularity."""
        return {"type": f"int{self.bits}", "range": "weights", "granularity": "per output channel"}
