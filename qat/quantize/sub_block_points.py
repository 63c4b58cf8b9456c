"""The quantization points of a sub-block, and the scales that follow from several of them."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from qat.nn.sub_block import SubBlock
from qat.quantize.activation_quantizers import ActivationQuantizer
from qat.quantize.backends import Backend
from qat.quantize.folding import (
    CONSTANT_BITS,
    QuantizerReference,
    gain_scale,
    largest_gain_step,
    product_scale,
    quantized_slope,
    scale_of,
)
from qat.quantize.quantizer_base import Quantizer
from qat.recipe.schema import TrunkGroup


class SubBlockPoints(SubBlock):
    """A sub-block with the parameters of ``module``, and a quantization point wherever a value appears.

    Args:
        module: the sub-block whose parameters are taken over.
        group: quantization of the values inside, ``None`` leaves them in float.
        source, target: the trunk's quantizers before and after the sub-block.
        backend: supplies the quantizers inside.

    Attributes:
        y: BN1's result and PReLU2's.
        gain: the attention times BN2's gain.
        product: ``gain ⊙ y`` before it meets the residual (scale kind).
        branch: BN2's result.
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
