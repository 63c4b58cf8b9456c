"""The fake-quantized twin of a sub-block; :mod:`qat.quantize.stem_and_head` says what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from qat.native.bindings import usable
from qat.native.passes import fits
from qat.nn.layers import SubBlock, pad_to_even, pool2x2
from qat.ops import native_autograd as nativefused
from qat.ops.binary import sign
from qat.ops.convolution import binary_conv2d
from qat.ops.norm_activation import (
    affine_form,
    can_fuse,
    can_norm,
    fold_batch_norm,
    native_norm_prelu,
    prelu,
    scaled,
    shifted_sign,
)
from qat.ops.planes import apply, without_autocast
from qat.ops.pooling import moments
from qat.quantize.attention import FakeQuantSqueezeExcitation
from qat.quantize.backends import Backend
from qat.quantize.constant_cache import held_integers
from qat.quantize.dyadic import (
    ACCUMULATOR_UNIT,
    PRODUCT_BITS,
    Dyadic,
    SumMultipliers,
    dyadic,
    sum_multipliers,
)
from qat.quantize.folding import (
    CONSTANT_BITS,
    LayerIntegers,
    QuantizerReference,
    flipped,
    folded_constants,
    gain_scale,
    is_ready,
    largest_gain_step,
    product_scale,
    quantized_slope,
    scale_of,
)
from qat.quantize.integers import mean_steps, prelu_steps, requantization, saturate
from qat.quantize.quantizers import ActivationQuantizer, Quantizer, fake_quantize_symmetric
from qat.recipe.schema import TrunkGroup
from qat.system.collectives import greatest


@dataclass(frozen=True, eq=False)
class BranchIntegers:
    """From ``y`` to BN2's result.

    Attributes:
        gain: (C,) float32; attention steps to gain steps, or the gain itself where there is no attention.
        input_mean, y_mean: (C,) float32 multipliers of the two means (attention only).
        first, second: multipliers of gain times ``y``, and of product times residual (scale kind).
        product_step: scale of the product (scale kind).
        offset: (C,) float32 integers, BN2's offset.
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
    """Constants of an integer sub-block; ``conv.weight`` is ±1, its accumulator counts in 1/64."""

    conv: LayerIntegers
    slopes: Tensor
    residual_slopes: Tensor | None
    branch: BranchIntegers | None
    sum: SumMultipliers


class FakeQuantSubBlock(SubBlock):
    """Twin of :class:`qat.nn.layers.SubBlock` whose values all lie on 8-bit grids.

    Args:
        module: the sub-block whose parameters are taken over.
        group: quantization of the values inside, ``None`` leaves them in float.
        source, target: the trunk's quantizers before and after the sub-block.
        backend: supplies the quantizers inside.
    """

    def __init__(
        self,
        module: SubBlock,
        group: TrunkGroup | None,
        source: Quantizer,
        target: Quantizer,
        backend: Backend,
    ) -> None:
        nn.Module.__init__(self)
        self.channels, self.kernel_size, self.stride = module.channels, module.kernel_size, module.stride
        self.kind, self.infor_recoupling = module.kind, module.infor_recoupling
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.binary_activation.zero_is_positive = True
        self.source, self.target = QuantizerReference(source), QuantizerReference(target)
        self.quantized = group is not None
        scale_kind = module.kind == "scale"
        self.has_branch = module.infor_recoupling or scale_kind
        self.y = backend.point(group, signed=True)
        self.product = backend.point(group if scale_kind else None, signed=True)
        self.branch = backend.point(group if self.has_branch else None, signed=True)
        # A channel whose branch is weak has a large gain in BN2 and little attention. Their product spans far
        # less than the gains alone do, which differ by factors of hundreds.
        of_gain = None
        if group is not None and module.infor_recoupling:
            of_gain = group.model_copy(update={"activation_bits": CONSTANT_BITS, "clip": None})
        self.gain = backend.point(of_gain, signed=True)

    def slope(self, activation: nn.PReLU) -> Tensor:
        """Slopes of one PReLU as the integer network has them, (C,)."""
        return quantized_slope(activation.weight) if self.quantized else activation.weight

    def product_step(self) -> Tensor:
        """Scale of the product in a sub-block of the scale kind."""
        if not self.source.quantizer.enabled:  # a trunk left in float has no steps to multiply with
            return scale_of(self.product)
        return product_scale(scale_of(self.product), scale_of(self.source.quantizer), scale_of(self.branch))

    def gain_step(self, gain: Tensor) -> Tensor:
        """Scale of the attention times BN2's ``gain``: the observed one, or what holds the gain alone."""
        step = self.product_step() if self.kind == "scale" else scale_of(self.branch)
        point = cast(ActivationQuantizer, self.y)
        smallest = scale_of(self.gain) if self.gain.has_grid else largest_gain_step(gain)
        return gain_scale(smallest, point.scale, step, point.power_of_two)

    def _computes_integers(self) -> bool:
        points = [self.y, self.source.quantizer, self.target.quantizer]
        points += [self.branch] if self.has_branch else []
        points += [self.product] if self.kind == "scale" else []
        if not is_ready(self, *points) or not self.binary_conv.is_binary():
            return False
        return not self.infor_recoupling or (
            isinstance(self.se, FakeQuantSqueezeExcitation) and self.se.has_grids
        )

    def integers(self) -> SubBlockIntegers:
        """Constants of the integer sub-block."""
        source, target, y = scale_of(self.source.quantizer), scale_of(self.target.quantizer), scale_of(self.y)
        gain, offset = folded_constants(self.norm1)
        weight = sign(self.binary_conv.weight.detach().float())
        conv = requantization(
            gain.abs() / ACCUMULATOR_UNIT / y.double(),
            offset / y.double(),
            ACCUMULATOR_UNIT * weight[0].numel(),
        )
        branch = self._branch_integers() if self.has_branch else None
        term = y if branch is None else scale_of(self.branch)
        return SubBlockIntegers(
            conv=LayerIntegers(flipped(weight, gain), conv),
            slopes=self.slope(self.activation2).detach().float(),
            residual_slopes=self.slope(self.activation1).detach().float() if self.kind == "scale" else None,
            branch=branch,
            sum=sum_multipliers(float(term) / float(target), float(source) / float(target)),
        )

    def _branch_integers(self) -> BranchIntegers:
        gain, offset = folded_constants(self.norm2)
        source, y, branch = scale_of(self.source.quantizer), scale_of(self.y), scale_of(self.branch)
        step = self.gain_step(gain).double()
        product = float(self.product_step()) if self.kind == "scale" else None
        second = None if product is None else dyadic(product * float(source) / float(branch), PRODUCT_BITS)
        input_mean = y_mean = None
        if self.infor_recoupling:
            se = cast(FakeQuantSqueezeExcitation, self.se)
            pooled = scale_of(se.pooled).double()
            mix = self.scale.detach().double().reshape(-1).clamp(0.0, 1.0)
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
            offset=cast(ActivationQuantizer, self.branch).saturate(offset / branch.double()).float(),
        )

    def _forward_integers(self, x: Tensor) -> Tensor:
        constants = held_integers(self)
        source, target, y_point = (
            cast(ActivationQuantizer, point)
            for point in (self.source.quantizer, self.target.quantizer, self.y)
        )
        q = source.steps(x)
        signs = sign(q * source.scale + self.move.bias.float())
        # Rounded, since some accelerators' convolution algorithms are exact only to the last places.
        accumulator = binary_conv2d(signs, constants.conv.weight, self.stride).round()
        y = y_point.saturate(constants.conv.requantization(accumulator * ACCUMULATOR_UNIT))
        y = prelu_steps(y, constants.slopes, y_point.quant_min, y_point.quant_max)
        residual = q
        if constants.residual_slopes is not None:
            residual = prelu_steps(q, constants.residual_slopes, source.quant_min, source.quant_max)
        if self.stride == 2:
            residual = source.saturate(pool2x2(residual))
        branch = y
        if constants.branch is not None:
            even = pad_to_even(q) if self.stride == 2 else q
            branch = self._branch_steps(constants.branch, even, y, residual)
        total = branch * constants.sum.branch.value + residual * constants.sum.residual.value
        return target.values(total).to(x.dtype)

    def _branch_steps(self, constants: BranchIntegers, x: Tensor, y: Tensor, residual: Tensor) -> Tensor:
        gain = constants.gain.view(1, -1, 1, 1)
        if constants.input_mean is not None and constants.y_mean is not None:
            pooled = mean_steps(x, constants.input_mean) + mean_steps(y, constants.y_mean)
            attention = cast(FakeQuantSqueezeExcitation, self.se).attention_steps(pooled)
            gain = saturate(attention * gain, -128, 127)
        point = cast(ActivationQuantizer, self.branch)
        branch = y * gain * constants.first.value
        if constants.second is not None:
            branch = (
                cast(ActivationQuantizer, self.product).saturate(branch) * residual * constants.second.value
            )
        return point.saturate(point.saturate(branch) + constants.offset.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉); the trunk's quantizer follows."""
        if self._computes_integers():
            with without_autocast(x):  # which would round the sums
                return self._forward_integers(x)
        y = self._activated(self.binary_conv(shifted_sign(x, self.move.bias, zero_is_positive=True)))
        residual = self._residual(x)
        if not self.has_branch:
            return y + residual

        scale_kind = self.kind == "scale"
        attention = (
            self.se(self.mix_means(x, y)) if self.infor_recoupling else torch.ones_like(self.move.bias)
        )
        if self.norm2.training:
            unscaled = y * residual if scale_kind else y
            affine = affine_form(self.norm2, attention.flatten(1), *moments(unscaled), y.shape[2:].numel())
        else:
            affine = fold_batch_norm(self.norm2)
        gain2, offset2 = (constant.to(self.norm2.weight.dtype).view(1, -1, 1, 1) for constant in affine)
        gain = attention * gain2
        if self.gain.enabled:
            gain = self.gain(gain)
        elif self.quantized:
            gain = fake_quantize_symmetric(gain, self.gain_step(gain2), CONSTANT_BITS)
        grid, inner = self.branch.settled(), self.product.settled()
        if grid is not None and (inner is not None or not scale_kind) and fits(y, residual):
            offset = self.branch.requantize(offset2).flatten()
            return apply(nativefused.ScaleAndAdd, y, gain.flatten(1), offset, residual, grid, inner)
        branch = scaled(y, gain.flatten(1))
        if scale_kind:
            branch = self.product(branch, overwrite=True) * residual
        # The same grid holds the branch before and after BN2's offset, and the offset: it must span all.
        observed = None
        if self.branch.observes:
            observed = _magnitudes(branch.detach(), offset2.detach(), self.branch.looks_at_extremes)
        branch = self.branch(branch, observed, overwrite=True)
        # In place, like the residual: what a sum has added up, no gradient asks for.
        branch = self.branch.requantize(branch.add_(self.branch.requantize(offset2)), overwrite=True)
        return branch.add_(residual)

    def _activated(self, accumulated: Tensor) -> Tensor:
        """``y`` of the convolution's sums."""
        slope, norm = self.slope(self.activation2), self.norm1
        if self.training:
            # Autocast leaves sums in half precision, whose steps are wider than the grid's.
            accumulated = accumulated.to(torch.promote_types(accumulated.dtype, norm.weight.dtype))
        grid = self.y.settled()
        if grid is not None and (can_fuse(norm) or not norm.training) and can_norm(accumulated):
            return native_norm_prelu(accumulated, norm, slope, grid)
        if self.training:
            normed: Tensor = norm(accumulated)
        else:
            gain, offset = (constant.view(1, -1, 1, 1) for constant in fold_batch_norm(norm))
            normed = torch.addcmul(offset, accumulated, gain)
        y = self.y(normed, overwrite=True)
        return self.y.requantize(prelu(y, slope), overwrite=True)

    def _residual(self, x: Tensor) -> Tensor:
        """The input as it is added, and multiplied with in a sub-block of the scale kind, on its own grid."""
        on_trunk, residual = self.source.quantizer.requantize, x
        if self.kind == "scale":
            grid, slope = self.source.quantizer.settled(), self.slope(self.activation1)
            if grid is not None and usable(x):
                residual = apply(nativefused.PReLU, x, slope, grid)
            else:
                residual = on_trunk(prelu(x, slope), overwrite=True)
        return on_trunk(pool2x2(residual), overwrite=True) if self.stride == 2 else residual


def _magnitudes(branch: Tensor, offset: Tensor, extremes: bool) -> Tensor:
    """The largest magnitudes of the branch (N, C, H, W) before and after the offset, and of the offset.

    Of every value, or of every channel where the largest one is all that is asked for; then of the images of
    all processes.
    """
    if not extremes:
        return torch.maximum(torch.maximum(branch.abs(), (branch + offset).abs()), offset.abs())
    # Over the images first, which torch vectorizes however small an image is.
    ends = [branch.amin(0).amin((1, 2)), branch.amax(0).amax((1, 2))]
    offset = offset.flatten()
    magnitudes = torch.stack([end.abs() for end in (*ends, *(end + offset for end in ends), offset)])
    return greatest(magnitudes.amax(0))
