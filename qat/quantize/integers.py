"""Integer arithmetic of a quantized network, on float tensors that hold integers.

The evaluation of a fake-quantized network and its lowering share these functions. Lowering exports the
constants that are computed here, and :mod:`qat_export.integer.reference` specifies the same operations. So a
fine-tuned network in evaluation mode computes the same numbers as its export.

A value "in steps" is divided by the scale of its grid: the integer ``q`` stands for ``q * scale``. Integers
are held in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.errors import QuantizationError
from qat.quantize.dyadic import LARGEST_SHIFT, PRODUCT_BITS

#: Smallest multiplier of an accumulator. At this multiplier, a bias that stands for any 8-bit result still
#: fits int32, and the largest accumulator of a binary convolution (18,432 products, in units of 1/64) moves
#: the result by less than half a step.
SMALLEST_MULTIPLIER: Final = 2.0**-22
#: Largest magnitude up to which float32 holds every integer exactly.
_EXACT: Final = 2**24


@dataclass(frozen=True)
class Requantization:
    """The step from an accumulator to the next grid: ``round((accumulator + bias) * multiplier)``.

    Attributes:
        multiplier: (C,) float32, positive.
        bias: (C,) float64, integers that fit int32.
        constant: (C,) bool, true for channels whose result does not depend on the accumulator.
    """

    multiplier: Tensor
    bias: Tensor
    constant: Tensor

    def __call__(self, accumulator: Tensor) -> Tensor:
        """``(accumulator + bias) * multiplier`` before rounding: (N, C, ...) integers in float → float32."""
        shape = (1, -1) + (1,) * (accumulator.ndim - 2)
        bias, multiplier = self.bias.view(shape), self.multiplier.view(shape)
        if float(self.bias.abs().max()) + float(accumulator.detach().abs().max()) >= _EXACT:
            # As with an int32 sum, only the conversion of the sum to float32 rounds.
            accumulator = accumulator.double()
        return (accumulator + bias.to(accumulator.dtype)).float() * multiplier


def requantization(gain: Tensor, offset: Tensor, reach: float) -> Requantization:
    """Multiplier and integer bias such that ``(acc + bias) * multiplier ≈ acc * gain + offset``.

    If a channel's gain is below :data:`SMALLEST_MULTIPLIER`, the bias might not fit int32. The result of such
    a channel is the constant ``round(offset)``.

    Args:
        gain: (C,) float64, not negative: steps of the result per unit of the accumulator.
        offset: (C,) float64, in steps of the result.
        reach: largest possible magnitude of the accumulator.

    Raises:
        QuantizationError: a gain or an offset is NaN or beyond float32: the network has diverged.
    """
    largest = max(float(gain.abs().max()), float(offset.abs().max()))
    if not largest <= torch.finfo(torch.float32).max:
        raise QuantizationError(f"a folded gain or offset of {largest:.3g} steps is no float32 number")
    constant = gain < SMALLEST_MULTIPLIER
    multiplier = torch.where(constant, SMALLEST_MULTIPLIER, gain).float()
    # The offset is limited so that the bias fits int32. With a larger offset, an 8-bit result would be
    # saturated whatever the accumulator is.
    limit = 300.0 + torch.where(constant, 0.0, reach * gain)
    steps = torch.where(constant, torch.round(offset), offset)
    steps = torch.minimum(torch.maximum(steps, -limit), limit)
    return Requantization(multiplier, torch.round(steps / multiplier.double()), constant)


def saturate(x: Tensor, low: int, high: int) -> Tensor:
    """Round half to even, then clamp to ``low`` … ``high``; any shape."""
    return torch.round(x).clamp_(low, high)


def prelu_steps(q: Tensor, slopes: Tensor, low: int, high: int) -> Tensor:
    """PReLU on integers: ``q`` if it is not negative, else ``saturate(q * slope)``.

    Args:
        q: (N, C, …), integers in ``low`` … ``high``.
        slopes: (C,), in the type of ``q``, on the grid of :func:`qat.quantize.folding.slope_scale`.
        low, high: smallest and largest integer of the grid.

    Returns:
        Integers in ``low`` … ``high``, same shape.
    """
    # Saturating also the positive side changes nothing: its integers are in the range.
    return saturate(F.prelu(q, slopes), low, high)


def mean_steps(q: Tensor, multiplier: Tensor) -> Tensor:
    """Mean of integers over the image times a multiplier: ``float32(sum) * (multiplier / pixels)``.

    Args:
        q: (N, C, H, W), integers.
        multiplier: (C,) or (1,) float32.

    Returns:
        (N, C, 1, 1) float32, before rounding.
    """
    # Divide by a tensor: a division by a Python number may be compiled to a multiplication by its inverse.
    pixels = torch.full_like(multiplier, q.shape[2] * q.shape[3])
    total = q.sum((2, 3), keepdim=True, dtype=torch.float64).float()
    return total * (multiplier / pixels).view(1, -1, 1, 1)


def sigmoid_table(scale: float, levels: int) -> Tensor:
    """``round(levels * σ(q * scale))`` for q = -128 … 127: the sigmoid as integers, (256,) float32."""
    logits = torch.arange(-128, 128, dtype=torch.float64) * scale
    return torch.round(levels * torch.sigmoid(logits)).float()


def snap_up(ratio: Tensor) -> Tensor:
    """Smallest number ``integer / 2**shift`` that is at least ``ratio``, with few bits in the integer.

    These are at most :data:`qat.quantize.dyadic.PRODUCT_BITS`, so that a product of two 8-bit integers times
    the number is exact in float32, and every target computes the same.
    :func:`qat.quantize.dyadic.dyadic` recovers integer and shift.

    Args:
        ratio: positive, any shape.
    """
    _, exponent = torch.frexp(ratio)
    shift = (PRODUCT_BITS - exponent).clamp_max(LARGEST_SHIFT)
    return torch.ldexp(torch.ceil(torch.ldexp(ratio, shift)), -shift)
