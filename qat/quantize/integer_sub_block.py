"""Evaluation of a sub-block with integers alone, and the same constants that lowering exports."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from qat.nn.layers import pad_to_even, pool2x2
from qat.ops.binary import sign
from qat.ops.convolution import binary_conv2d
from qat.quantize.activation_quantizers import ActivationQuantizer
from qat.quantize.attention import FakeQuantSqueezeExcitation
from qat.quantize.dyadic import ACCUMULATOR_UNIT
from qat.quantize.folding import is_ready
from qat.quantize.integers import mean_steps, prelu_steps, saturate
from qat.quantize.sub_block_constants import BranchIntegers, SubBlockIntegers
from qat.quantize.sub_block_points import SubBlockPoints


def computes_integers(block: SubBlockPoints) -> bool:
    """Whether the sub-block can compute integers.

    It is in evaluation mode, its weights are binary, and every grid it needs is calibrated and has at most 8
    bits.
    """
    points = [block.y, block.source.quantizer, block.target.quantizer]
    points += [block.branch] if block.has_branch else []
    points += [block.product] if block.kind == "scale" else []
    if not is_ready(block, *points) or not block.binary_conv.is_binary():
        return False
    return not block.infor_recoupling or (
        isinstance(block.se, FakeQuantSqueezeExcitation) and block.se.has_grids
    )


def integer_sub_block(block: SubBlockPoints, constants: SubBlockIntegers, x: Tensor) -> Tensor:
    """Compute a sub-block with integers, each step as :mod:`qat_export.integer.reference` defines it.

    Args:
        block: a sub-block for which :func:`computes_integers` is true.
        constants: constants of the block.
        x: input (N, C, H, W), whose values lie on the grid of the trunk's quantizer before the block.

    Returns:
        Output (N, C, ⌈H/stride⌉, ⌈W/stride⌉), whose values lie on the grid of the next trunk quantizer.
    """
    source, target, y_point = (
        cast(ActivationQuantizer, point)
        for point in (block.source.quantizer, block.target.quantizer, block.y)
    )
    q = source.steps(x)
    signs = sign(q * source.scale + block.move.bias.float())
    # The sum is an integer. Rounding removes errors in the last bits, which some algorithms that accelerators
    # use for convolutions have.
    accumulator = binary_conv2d(signs, constants.conv.weight, block.stride).round()
    y = y_point.saturate(constants.conv.requantization(accumulator * ACCUMULATOR_UNIT))
    y = prelu_steps(y, constants.slopes, y_point.quant_min, y_point.quant_max)
    residual = q
    if constants.residual_slopes is not None:
        residual = prelu_steps(q, constants.residual_slopes, source.quant_min, source.quant_max)
    if block.stride == 2:
        residual = source.saturate(pool2x2(residual))
    branch = y
    if constants.branch is not None:
        even = pad_to_even(q) if block.stride == 2 else q
        branch = _branch_steps(block, constants.branch, even, y, residual)
    total = branch * constants.sum.branch.value + residual * constants.sum.residual.value
    return target.values(total).to(x.dtype)


def _branch_steps(
    block: SubBlockPoints, constants: BranchIntegers, x: Tensor, y: Tensor, residual: Tensor
) -> Tensor:
    gain = constants.gain.view(1, -1, 1, 1)
    if constants.input_mean is not None and constants.y_mean is not None:
        pooled = mean_steps(x, constants.input_mean) + mean_steps(y, constants.y_mean)
        attention = cast(FakeQuantSqueezeExcitation, block.se).attention_steps(pooled)
        gain = saturate(attention * gain, -128, 127)
    point = cast(ActivationQuantizer, block.branch)
    branch = y * gain * constants.first.value
    if constants.second is not None:
        branch = cast(ActivationQuantizer, block.product).saturate(branch) * residual * constants.second.value
    return point.saturate(point.saturate(branch) + constants.offset.view(1, -1, 1, 1))
