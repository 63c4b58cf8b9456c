"""The quantization points of a sub-block, and the scales that depend on several of them."""

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
    """A sub-block with a quantization point for every value inside.

    Args:
        module: float sub-block, whose parameters are taken over.
        group: settings of the points inside; ``None`` leaves their values in float.
        source, target: quantizers of the trunk before and after the sub-block.
        backend: makes the points inside.

    Attributes:
        y: point of BN1's result, whose grid PReLU2's result shares.
        gain: point of the attention times BN2's gain.
        product: point of ``gain ⊙ y``, before the product with the residual (scale kind only).
        branch: point of BN2's result.
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
        # BN2's gains differ by factors of hundreds between channels. Channels with a large gain have little
        # attention, so the products differ much less. Their grid is observed, so that it can be finer.
        of_gain = None
        if group is not None and module.infor_recoupling:
            of_gain = group.model_copy(update={"activation_bits": CONSTANT_BITS, "clip": None})
        self.gain = backend.point(of_gain, signed=True)

    def slope(self, activation: nn.PReLU) -> Tensor:
        """Slopes (C,) of one PReLU, rounded to their grid if the trunk is quantized."""
        return quantized_slope(activation.weight) if self.quantized else activation.weight

    def product_step(self) -> Tensor:
        """Scale of the product in a sub-block of the scale kind: (1,) float32."""
        if not self.source.quantizer.enabled:
            return scale_of(self.product)  # the residual is left in float and has no scale
        return product_scale(scale_of(self.product), scale_of(self.source.quantizer), scale_of(self.branch))

    def gain_step(self, gain: Tensor) -> Tensor:
        """Scale of the attention times BN2's ``gain``: made from the observed one, or from the gain alone."""
        step = self.product_step() if self.kind == "scale" else scale_of(self.branch)
        point = cast(ActivationQuantizer, self.y)
        smallest = scale_of(self.gain) if self.gain.has_grid else largest_gain_step(gain)
        return gain_scale(smallest, point.scale, step, point.power_of_two)
