"""What fake-quantized modules share: folded batch normalization, and the scales of their constants.

Batch normalization is folded everywhere: its gain and offset become part of the operation before it. In
training they come from the batch, or from the running statistics once these are frozen. In evaluation they
are part of an integer requantization (:func:`folded_constants`). Running statistics can be re-estimated after
training (:mod:`qat.train.batch_norm_reestimation`).

If scales are powers of two (``quantization.power_of_two``), the multipliers that are ratios of scales are
powers of two as well: in residual sums and products, in the layers of channel attention, in the classifier,
and in the head's mean before the division by the number of pixels. Other multipliers contain a learned
factor and are no powers of two: a gain of batch normalization (in the requantizations after the stem and the
binary convolutions, and in the gain vector made from the attention) or a mix scale (in the means that channel
attention takes). The grids of image and attention, whose scales are fixed and no powers of two, occur in
multipliers of the second sort only.
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

#: Bits of PReLU slopes, and of folded gains and offsets of batch normalizations, in a quantized trunk.
CONSTANT_BITS: Final = 8


@dataclass(frozen=True, eq=False)
class QuantizerReference:
    """Reference to a quantizer that another module owns. It hides the quantizer from ``nn.Module``.

    Otherwise the quantizer would be registered, and its state saved, under two names.
    """

    quantizer: Quantizer


def folded_constants(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Gain and offset of a batch normalization with its running statistics: (C,) float64, without gradients.

    ``gain = weight / √(var + ε)`` and ``offset = bias − mean · gain``. They are float64 so that an exported
    constant is rounded only once, when it becomes an integer or a float32 multiplier.
    """
    with torch.no_grad():
        return folded_batch_norm(norm, torch.float64)


def slope_scale(slope: Tensor) -> Tensor:
    """Scale of the 8-bit grid of PReLU slopes: scalar tensor.

    It is the smallest power of two, at least 2^-14, at which no slope exceeds 127 steps. Since it is a power
    of two, slope times integer is exact in float32, in any order of operations.
    """
    largest = slope.detach().float().abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2(torch.ceil(torch.log2(largest / 127.0))).clamp_min(2.0**-14)


def quantized_slope(slope: Tensor) -> Tensor:
    """Slopes (C,) rounded to the grid of :func:`slope_scale`, with a straight-through gradient."""
    return fake_quantize_symmetric(slope, slope_scale(slope), CONSTANT_BITS)


def largest_gain_step(gain: Tensor) -> Tensor:
    """Scale of a signed 8-bit grid that holds ``gain``, of any shape: ``max|gain| / 127``, a scalar tensor.

    ``gain`` is BN2's. The grid also holds its product with the attention, which is at most 1.
    """
    return gain.detach().float().abs().amax().clamp_min(1e-20) / 127.0


def gain_scale(smallest: Tensor, y: Tensor, product: Tensor, power_of_two: bool = False) -> Tensor:
    """Scale of the gain, the attention times BN2's gain: scalar tensor.

    It is ``smallest``, raised a little so that the multiplier ``scale · y / product``, from ``gain · y`` to
    its grid, is dyadic with few bits; or raised to the next power of two.

    Args:
        smallest: the scale to raise.
        y: scale of ``y``.
        product: scale of the grid that ``gain · y`` is rounded to.
        power_of_two: whether the result is to be a power of two; ``y`` and ``product`` are then, too.
    """
    if power_of_two:
        smallest = power_of_two_above(smallest)
    return snap_up(smallest * y / product) * product / y


def product_scale(product: Tensor, residual: Tensor, branch: Tensor) -> Tensor:
    """Scale of ``gain · y`` in a sub-block of the scale kind: scalar tensor.

    It is the observed scale, raised a little so that the multiplier ``scale · residual / branch``, from the
    product with the residual to the branch's grid, is dyadic with few bits. Powers of two need no raise.

    Args:
        product: observed scale of ``gain · y``.
        residual: scale of the residual.
        branch: scale of the branch.
    """
    return snap_up(product * residual / branch) * branch / residual


def is_ready(module: nn.Module, *points: Quantizer) -> bool:
    """Whether ``module`` can compute integers: it is in evaluation mode, and all points have integer grids.

    A point has one if it is calibrated and has at most 8 bits.
    """
    return not module.training and all(point.is_integer for point in points)


def flipped(weight: Tensor, gain: Tensor) -> Tensor:
    """``weight`` (O, ...) with the sign changed in output channels of negative ``gain`` (O,).

    So the multiplier, which is made from the magnitude of the gain, can be positive.
    """
    flip = torch.where(gain < 0, -1.0, 1.0).to(weight.dtype)
    return weight * flip.view(-1, *[1] * (weight.ndim - 1))


@dataclass(frozen=True, eq=False)
class LayerIntegers:
    """Integer weights (O, ...), held in float32, and the requantization of their accumulator."""

    weight: Tensor
    requantization: Requantization


def scale_of(point: Quantizer) -> Tensor:
    """Scale of a quantization point that is not left in float: (1,) float32."""
    return cast(ActivationQuantizer, point).scale
