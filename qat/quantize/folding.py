"""What fake-quantized modules share: folded batch normalization, and the scales of their constants.

Batch normalization is folded everywhere: its gain and offset become part of the operation before it. In
training they come from the batch, or from the running statistics once these are frozen; in evaluation they
are part of an integer requantization (:func:`folded_constants`). Running statistics can be estimated anew
after training (:mod:`qat.train.batch_norm_reestimation`).

With powers of two as scales (``quantization.power_of_two``), multipliers made of scales alone are powers of
two, too: those of residual sums and products, the layers of channel attention, the classifier, and the head's
mean before it is divided by its pixels. Not those that carry a learned factor: the requantizations after the
stem and the binary convolutions and the attention's gain (gains of batch normalizations), and the means that
channel attention takes (mix scales). The fixed grids, image and attention, meet only such multipliers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor, nn

from qat.ops.batch_norm import folded_batch_norm
from qat.quantize.activation_quantizers import ActivationQuantizer, fake_quantize_symmetric
from qat.quantize.integers import Requantization, snap_up
from qat.quantize.quantizer_base import Quantizer, power_of_two_above

#: Bits of PReLU slopes and of folded batch-norm offsets and gains in a quantized trunk.
CONSTANT_BITS: Final = 8


@dataclass(frozen=True, eq=False)
class QuantizerReference:
    """Reference to the quantizer that another module owns, so that it is not registered twice."""

    quantizer: Quantizer


def folded_constants(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Gain and offset (C,) of a batch normalization with its running statistics, float64, without gradients.

    In float64, so that an exported constant is rounded once, when it becomes an integer or a float32
    multiplier.
    """
    with torch.no_grad():
        return folded_batch_norm(norm, torch.float64)


def slope_scale(slope: Tensor) -> Tensor:
    """Smallest power of two (at least 2^-14) whose signed 8-bit grid holds every slope: scalar tensor.

    A power of two makes slope times integer exact in float32, in any order of operations.
    """
    largest = slope.detach().float().abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2(torch.ceil(torch.log2(largest / 127.0))).clamp_min(2.0**-14)


def quantized_slope(slope: Tensor) -> Tensor:
    """Slopes (C,) on their grid; straight-through gradient."""
    return fake_quantize_symmetric(slope, slope_scale(slope), CONSTANT_BITS)


def largest_gain_step(gain: Tensor) -> Tensor:
    """Step of a signed 8-bit grid that holds BN2's ``gain``, any shape, at attention 1: scalar tensor."""
    return gain.detach().float().abs().amax().clamp_min(1e-20) / 127.0


def gain_scale(smallest: Tensor, y: Tensor, product: Tensor, power_of_two: bool = False) -> Tensor:
    """Scale of the attention times BN2's gain, per tensor: scalar tensor.

    Raised a little so that the multiplier from ``gain · y`` to the product's grid has few bits, or to the
    next power of two.

    Args:
        smallest: the scale to raise.
        y: scale of ``y``.
        product: scale of the grid on which ``gain · y`` is put.
        power_of_two: whether it is to be one, as the two other scales are then.
    """
    if power_of_two:
        smallest = power_of_two_above(smallest)
    return snap_up(smallest * y / product) * product / y


def product_scale(product: Tensor, residual: Tensor, branch: Tensor) -> Tensor:
    """Scale of ``gain · y`` in a sub-block of the scale kind: scalar tensor.

    The observed one, raised a little so that the multiplier from product times residual to the branch's grid
    has few bits; of three powers of two it is the observed one.
    """
    return snap_up(product * residual / branch) * branch / residual


def is_ready(module: nn.Module, *points: Quantizer) -> bool:
    """Whether ``module`` can compute integers: evaluating, and every grid is known and of 8 bits or fewer."""
    return not module.training and all(point.is_integer for point in points)


def flipped(weight: Tensor, gain: Tensor) -> Tensor:
    """Weights whose output channels of negative gain change sign, so that multipliers are positive."""
    flip = torch.where(gain < 0, -1.0, 1.0).to(weight.dtype)
    return weight * flip.view(-1, *[1] * (weight.ndim - 1))


@dataclass(frozen=True, eq=False)
class LayerIntegers:
    """Integer weights (O, ...) in float32, and the requantization of their accumulator."""

    weight: Tensor
    requantization: Requantization


def scale_of(point: Quantizer) -> Tensor:
    """Step of a quantized point's grid, (1,) float32."""
    return cast(ActivationQuantizer, point).scale
