"""The fake-quantized stem and head; the sub-blocks between them are in :mod:`qat.quantize.sub_block`.

Each module takes over the parameters of the float module that it replaces, under the same names. ``Q`` is a
quantization point with its own grid, and ``[·]`` rounds to the grid of another one, here that of ``x``:

- stem: ``Q_trunk(BN(conv(Q_image(x), Q_weight(w))))``
- head: ``fc(Q_input(mean([PReLU(x)]_x)))``

In training, values are rounded in float32 with straight-through gradients. In evaluation, once the grids that
a module needs are calibrated, it computes integers (:mod:`qat.quantize.integers`) with the constants that
lowering exports, which its ``integers()`` returns.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.nn.layers import GlobalAveragePool, Stem
from qat.ops.planes import without_autocast
from qat.ops.prelu import prelu
from qat.quantize.activation_quantizers import ActivationQuantizer, FixedQuantizer
from qat.quantize.backends import Backend
from qat.quantize.constant_cache import integers_of
from qat.quantize.folding import (
    LayerIntegers,
    QuantizerReference,
    flipped,
    folded_constants,
    is_ready,
    quantized_slope,
    scale_of,
)
from qat.quantize.integers import Requantization, mean_steps, prelu_steps, requantization
from qat.quantize.quantizer_base import Quantizer, power_of_two_above
from qat.recipe.schema import Group

__all__ = ["FakeQuantLinear", "FakeQuantPReLU", "FakeQuantPool", "FakeQuantStem"]


class FakeQuantStem(Stem):
    """The stem with a quantized image and quantized weights.

    Args:
        stem: float stem, whose parameters are taken over.
        bits: bits of the weights.
        grid: scale and zero point of the uint8 grid of the image.
        backend: makes the quantizer of the weights.
    """

    def __init__(self, stem: Stem, bits: int, grid: tuple[float, int], backend: Backend) -> None:
        nn.Module.__init__(self)
        self.conv1, self.bn1, self.prelu, self.trunk = stem.conv1, stem.bn1, stem.prelu, stem.trunk
        self.image = FixedQuantizer(*grid)
        self.weight_quantizer = backend.weight(bits, stem.conv1.weight)

    def integers(self) -> LayerIntegers:
        """Constants of the integer stem."""
        weight, scale = self.weight_quantizer.integers(self.conv1.weight)
        gain, offset = folded_constants(self.bn1)
        unit, step = self.image.scale.double(), cast(ActivationQuantizer, self.trunk).scale.double()
        rule = requantization(gain.abs() * scale * unit / step, offset / step, weight[0].numel() * 127 * 255)
        weight = flipped(weight, gain) * ~rule.constant.view(-1, 1, 1, 1)
        return LayerIntegers(weight, rule)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        stride, padding = self.conv1.stride, self.conv1.padding
        if is_ready(self, cast(Quantizer, self.trunk)):
            layer, trunk = integers_of(self), cast(ActivationQuantizer, self.trunk)
            # The sum is an integer. Rounding removes errors in the last bits, which some algorithms that
            # accelerators use for convolutions have.
            with without_autocast(x):
                out = F.conv2d(self.image.steps(x), layer.weight, stride=stride, padding=padding).round()
            return trunk.values(layer.requantization(out)).to(x.dtype)
        weight = self.weight_quantizer(self.conv1.weight)
        out = F.conv2d(self.image(x), weight, stride=stride, padding=padding)
        result: Tensor = self.trunk(self.bn1(out))
        return result


class FakeQuantPReLU(nn.PReLU):
    """The head's PReLU, with slopes of 8 bits; its result is on the grid of its input."""

    def __init__(self, module: nn.PReLU, source: Quantizer) -> None:
        nn.Module.__init__(self)
        self.num_parameters, self.weight = module.num_parameters, module.weight
        self.source = QuantizerReference(source)

    def forward(self, input: Tensor) -> Tensor:
        """Values (N, C, H, W) on the trunk's grid → same shape and grid."""
        source, slopes = self.source.quantizer, quantized_slope(self.weight)
        if is_ready(self, source):
            point = cast(ActivationQuantizer, source)
            q = prelu_steps(point.steps(input), slopes.detach().float(), point.quant_min, point.quant_max)
            return point.values(q).to(input.dtype)
        return prelu(input, slopes, source)


class FakeQuantPool(GlobalAveragePool):
    """The head's pooling: the mean over the image, rounded to the grid of the classifier's input."""

    def __init__(self, source: Quantizer, target: Quantizer) -> None:
        super().__init__()
        self.source, self.target = QuantizerReference(source), QuantizerReference(target)

    def multiplier(self) -> Tensor:
        """Ratio of the trunk's scale to that of the classifier's input: (1,) float32."""
        return (scale_of(self.source.quantizer).double() / scale_of(self.target.quantizer).double()).float()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C)."""
        if not is_ready(self, self.source.quantizer, self.target.quantizer):
            return super().forward(x)
        source, target = (cast(ActivationQuantizer, grid.quantizer) for grid in (self.source, self.target))
        return target.values(mean_steps(source.steps(x), self.multiplier())).flatten(1).to(x.dtype)


class FakeQuantLinear(nn.Linear):
    """The classifier: quantized input and weights, float logits."""

    def __init__(self, module: nn.Linear, group: Group, backend: Backend) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.weight, self.bias = module.weight, module.bias
        self.input = backend.point(group, signed=True)
        self.weight_quantizer = backend.weight(group.weight_bits, module.weight)

    def integers(self) -> LayerIntegers:
        """Constants of the integer classifier; its multiplier gives logits."""
        weight, scale = self.weight_quantizer.integers(self.weight)
        offset, step = self.bias.detach().double(), scale * scale_of(self.input).double()
        # If all weights of a row are almost zero, its scale is tiny, and the bias in steps might not fit
        # int32. The scale is raised until it fits, and the row's products are dropped, which are less than 2%
        # of such a bias.
        raised = torch.maximum(step, offset.abs() / 2.0**30)
        if self.weight_quantizer.power_of_two:
            raised = power_of_two_above(raised)
        constant = raised > step
        multiplier = raised.float()
        rule = Requantization(multiplier, torch.round(offset / multiplier.double()), constant)
        return LayerIntegers(weight * ~constant.view(-1, 1), rule)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C) → logits (N, num_classes)."""
        if is_ready(self, self.input):
            layer = integers_of(self)
            q = cast(ActivationQuantizer, self.input).steps(input)
            return layer.requantization(F.linear(q.double(), layer.weight.double())).to(input.dtype)
        return F.linear(self.input(input), self.weight_quantizer(self.weight), self.bias)
