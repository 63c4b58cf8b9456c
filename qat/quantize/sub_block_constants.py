"""The constants of an integer sub-block, with which it is evaluated and which lowering exports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from qat.ops.binary import sign
from qat.quantize.activation_quantizers import ActivationQuantizer
from qat.quantize.attention import FakeQuantSqueezeExcitation
from qat.quantize.dyadic import (
    ACCUMULATOR_UNIT,
    PRODUCT_BITS,
    Dyadic,
    SumMultipliers,
    dyadic,
    sum_multipliers,
)
from qat.quantize.folding import LayerIntegers, flipped, folded_constants, scale_of
from qat.quantize.integers import requantization, saturate
from qat.quantize.sub_block_points import SubBlockPoints


@dataclass(frozen=True, eq=False)
class BranchIntegers:
    """Constants of a branch, which leads from ``y`` to BN2's result.

    Attributes:
        gain: (C,) float32. With attention, the multiplier from the attention's integers to those of the gain;
            without, the integers of the gain.
        input_mean, y_mean: (C,) float32 multipliers of the means of the input and of ``y``, which attention
            takes; ``None`` without attention.
        first: multiplier of gain times ``y``.
        second: multiplier of the product of that with the residual; ``None`` in the bias kind.
        product_step: scale of gain times ``y``; ``None`` in the bias kind.
        offset: (C,) float32, integers of BN2's offset.
    """

    gain: Tensor
    input_mean: Tensor | None
    y_mean: Tensor | None
    first: Dyadic
    second: Dyadic | None
    product_step: float | None
    offset: Tensor


@dataclass(frozen=True, eq=False)
class SubBlockIntegers:
    """Constants of an integer sub-block.

    Attributes:
        conv: binary convolution: weights ±1, and a requantization whose accumulator is the sum of products
            times :data:`qat.quantize.dyadic.ACCUMULATOR_UNIT`.
        slopes: slopes (C,) of PReLU2.
        residual_slopes: slopes (C,) of PReLU1; ``None`` in the bias kind.
        branch: constants of the branch; ``None`` if ``y`` is added to the residual as it is.
        sum: multipliers of the residual sum.
    """

    conv: LayerIntegers
    slopes: Tensor
    residual_slopes: Tensor | None
    branch: BranchIntegers | None
    sum: SumMultipliers


def sub_block_integers(block: SubBlockPoints) -> SubBlockIntegers:
    """The constants of ``block``, whose grids must all be calibrated.

    Raises:
        QuantizationError: a folded gain or offset is NaN or beyond float32.
    """
    source, target, y = scale_of(block.source.quantizer), scale_of(block.target.quantizer), scale_of(block.y)
    gain, offset = folded_constants(block.norm1)
    weight = sign(block.binary_conv.weight.detach().float())
    conv = requantization(
        gain.abs() / ACCUMULATOR_UNIT / y.double(),
        offset / y.double(),
        ACCUMULATOR_UNIT * weight[0].numel(),
    )
    branch = _branch_integers(block) if block.has_branch else None
    term = y if branch is None else scale_of(block.branch)
    return SubBlockIntegers(
        conv=LayerIntegers(flipped(weight, gain), conv),
        slopes=block.slope(block.activation2).detach().float(),
        residual_slopes=block.slope(block.activation1).detach().float() if block.kind == "scale" else None,
        branch=branch,
        sum=sum_multipliers(float(term) / float(target), float(source) / float(target)),
    )


def _branch_integers(block: SubBlockPoints) -> BranchIntegers:
    gain, offset = folded_constants(block.norm2)
    source, y, branch = scale_of(block.source.quantizer), scale_of(block.y), scale_of(block.branch)
    step = block.gain_step(gain).double()
    product = float(block.product_step()) if block.kind == "scale" else None
    second = None if product is None else dyadic(product * float(source) / float(branch), PRODUCT_BITS)
    input_mean = y_mean = None
    if block.infor_recoupling:
        se = cast(FakeQuantSqueezeExcitation, block.se)
        pooled = scale_of(se.pooled).double()
        mix = block.scale.detach().double().reshape(-1).clamp(0.0, 1.0)
        input_mean = (mix * source.double() / pooled).float()
        y_mean = ((1.0 - mix) * y.double() / pooled).float()
        factor = (gain / step * se.attention.scale.double()).float()
    else:
        factor = saturate(gain / step, -128, 127).float()
    return BranchIntegers(
        gain=factor,
        input_mean=input_mean,
        y_mean=y_mean,
        first=dyadic(float(y) * float(step) / (product or float(branch)), PRODUCT_BITS),
        second=second,
        product_step=product,
        offset=cast(ActivationQuantizer, block.branch).saturate(offset / branch.double()).float(),
    )
