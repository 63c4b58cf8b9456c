"""Integer arithmetic of a quantized network, on float tensors that hold integers.

The evaluation of a fake-quantized network and its lowering share these functions: whatever constant a module
computes here is the constant that is exported, and each operation here is the one that
:mod:`qat_export.integer.reference` specifies. So a fine-tuned network in evaluation mode gives the numbers of
its export.

"Steps" are integers ``q`` that stand for ``q * scale``, held in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.errors import QuantizationError
from qat.quantize.dyadic import LARGEST_SHIFT, PRODUCT_BITS

#: Smallest multiplier of an accumulator. An 8-bit result as a bias at this scale still fits int32, and the
#: largest binary accumulator (18,432 products in 1/64) moves it by less than half a step.
SMALLEST_MULTIPLIER: Final = 2.0**-22
#: Up to here every integer is exact in float32.
_EXACT: Final = 2**24


@dataclass(frozen=True)
class Requantization:
    """``round((accumulator + bias) * multiplier)``.

    Attributes:
        multiplier: (C,) float32, positive.
        bias: (C,) float64 integers that fit int32.
        constant: (C,) bool, channels whose result does not depend on the accumulator.
    """

    multiplier: Tensor
    bias: Tensor
    constant: Tensor

    def __call__(self, accumulator: Tensor) -> Tensor:
        """(N, C, ...) float integers → float32, before rounding."""
        shape = (1, -1) + (1,) * (accumulator.ndim - 2)
        bias, multiplier = self.bias.view(shape), self.multiplier.view(shape)
        if float(self.bias.abs().max()) + float(accumulator.detach().abs().max()) >= _EXACT:
            accumulator = accumulator.double()  # the sum is rounded to float32 once, like an int32 would be
        return (accumulator + bias.to(accumulator.dtype)).float() * multiplier


def requantization(gain: Tensor, offset: Tensor, reach: float) -> Requantization:
    """Multiplier and integer bias such that ``(acc + bias) * multiplier ≈ acc * gain + offset``.

    Where a gain is too small for its offset to fit int32 as a bias, the result is the constant
    ``round(offset)``.

    Args:
        gain: (C,) float64, not negative: steps of the result per unit of the accumulator.
        offset: (C,) float64, in steps of the result.
        reach: largest magnitude of the accumulator.

    Raises:
        QuantizationError: a gain or an offset is not a float32 number; the network has diverged.
    """
    largest = max(float(gain.abs().max()), float(offset.abs().max()))
    if not largest <= torch.finfo(torch.float32).max:
        raise QuantizationError(f"a folded gain or offset of {largest:.3g} steps is no float32 number")
    constant = gain < SMALLEST_MULTIPLIER
    multiplier = torch.where(constant, SMALLEST_MULTIPLIER, gain).float()
    # Beyond ±300 steps plus everything the accumulator can add, an 8-bit result is saturated anyway.
    limit = 300.0 + torch.where(constant, 0.0, reach * gain)
    steps = torch.where(constant, torch.round(offset), offset)
    steps = torch.minimum(torch.maximum(steps, -limit), limit)
    return Requantization(multiplier, torch.round(steps / multiplier.double()), constant)


def saturate(x: Tensor, low: int, high: int) -> Tensor:
    """Round half to even, then clamp."""
    return torch.round(x).clamp_(low, high)


def prelu_steps(q: Tensor, slopes: Tensor, low: int, high: int) -> Tensor:
    """``q`` where it is not negative, else ``saturate(q * slope)``: (N, C, …), integers in low … high.

    Slopes (C,) on an 8-bit dyadic grid, in the type of ``q``. Integers of the range are not changed by
    saturating, so the positive side passes as it is.
    """
    return saturate(F.prelu(q, slopes), low, high)


def mean_steps(q: Tensor, multiplier: Tensor) -> Tensor:
    """``float32(sum) * (multiplier / pixels)`` over the image: (N, C, H, W) → (N, C, 1, 1) float32."""
    pixels = torch.full_like(
        multiplier, q.shape[2] * q.shape[3]
    )  # a tensor: division by a Python number may be compiled to a multiplication
    total = q.sum((2, 3), keepdim=True, dtype=torch.float64).float()
    return total * (multiplier / pixels).view(1, -1, 1, 1)


def sigmoid_table(scale: float, levels: int) -> Tensor:
    """Sigmoid of the logits ``q * scale`` for q = -128 … 127, in steps of ``1 / levels``: (256,) float32."""
    logits = torch.arange(-128, 128, dtype=torch.float64) * scale
    return torch.round(levels * torch.sigmoid(logits)).float()


def snap_up(ratio: Tensor) -> Tensor:
    """The next number ``integer / 2**shift`` with an integer of at most :data:`PRODUCT_BITS` bits.

    A product of two 8-bit integers times such a number is exact in float32, so every target computes it
    alike; see :func:`qat.quantize.dyadic.dyadic`, which recovers integer and shift.
    """
    _, exponent = torch.frexp(ratio)
    shift = (PRODUCT_BITS - exponent).clamp_max(LARGEST_SHIFT)
    return torch.ldexp(torch.ceil(torch.ldexp(ratio, shift)), -shift)
