"""The fake-quantized channel attention (squeeze and excitation, SE) of a sub-block.

Of the pooled vector ``m``, with quantized weights ``W1`` and ``W3``, and every ``Q`` a quantization point
with its own grid::

    h = Q_hidden(relu(W1 · Q_pooled(m) + b1))    z = Q_logits(W3 · h + b3)    a = Q_attention(σ(z))

The logits ``z`` are quantized so that the sigmoid becomes a function of one integer of at most 8 bits: a
table of 256 entries, which every runtime computes exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.nn.layers import SqueezeExcitation
from qat.quantize.activation_quantizers import ActivationQuantizer, FixedQuantizer
from qat.quantize.backends import Backend
from qat.quantize.constant_cache import integers_of
from qat.quantize.folding import LayerIntegers
from qat.quantize.integers import requantization, sigmoid_table
from qat.recipe.schema import Group


@dataclass(frozen=True, eq=False)
class AttentionIntegers:
    """Constants of a channel attention: both layers, and the table (256,) of the sigmoid."""

    reduce: LayerIntegers
    expand: LayerIntegers
    table: Tensor


class FakeQuantSqueezeExcitation(SqueezeExcitation):
    """Channel attention whose vectors and weights are quantized, to the bits of the recipe's group ``se``."""

    def __init__(self, module: SqueezeExcitation, group: Group, backend: Backend) -> None:
        nn.Module.__init__(self)
        self.se = module.se
        self.pooled = backend.point(group, signed=True)
        self.hidden = backend.point(group, signed=False)
        self.logits = backend.point(group, signed=True)
        self.attention = FixedQuantizer(1.0 / (2**group.activation_bits - 1), 0, group.activation_bits)
        self.weight_quantizer = backend.weight(
            group.weight_bits, *(cast(nn.Conv2d, self.se[index]).weight for index in (1, 3))
        )

    @property
    def has_grids(self) -> bool:
        """Whether the grid of every vector has been calibrated."""
        return all(point.has_grid for point in (self.pooled, self.hidden, self.logits))

    def integers(self) -> AttentionIntegers:
        """Constants of the integer attention."""
        pooled, hidden, logits = (
            cast(ActivationQuantizer, point) for point in (self.pooled, self.hidden, self.logits)
        )
        return AttentionIntegers(
            self._layer(cast(nn.Conv2d, self.se[1]), pooled, hidden),
            self._layer(cast(nn.Conv2d, self.se[3]), hidden, logits),
            sigmoid_table(float(logits.scale), self.attention.quant_max).to(logits.scale.device),
        )

    def _layer(
        self, layer: nn.Conv2d, source: ActivationQuantizer, target: ActivationQuantizer
    ) -> LayerIntegers:
        weight, scale = self.weight_quantizer.integers(layer.weight)
        step = target.scale.double()
        reach = weight[0].numel() * 127 * max(-source.quant_min, source.quant_max)
        bias = cast(Tensor, layer.bias).detach().double()
        rule = requantization(scale * source.scale.double() / step, bias / step, reach)
        return LayerIntegers(weight * ~rule.constant.view(-1, 1, 1, 1), rule)

    def attention_steps(self, pooled: Tensor) -> Tensor:
        """Compute the attention with integers alone.

        Args:
            pooled: pooled vector (N, C, 1, 1) in steps of its grid, not yet rounded.

        Returns:
            The attention (N, C, 1, 1) in steps of its grid.
        """
        constants = integers_of(self)
        q = cast(ActivationQuantizer, self.pooled).saturate(pooled)
        for layer, point in ((constants.reduce, self.hidden), (constants.expand, self.logits)):
            # In float64, since a sum of thousands of products can exceed 2**24, up to which float32 is exact.
            accumulator = F.conv2d(q.double(), layer.weight.double())
            q = cast(ActivationQuantizer, point).saturate(layer.requantization(accumulator))
        # NaN and infinities can't be an index into the table. The last term makes the result NaN there.
        return constants.table[(q + 128).nan_to_num(0.0, 0.0, 0.0).long()] + 0.0 * q.float()

    def _values(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        weight = self.weight_quantizer(layer.weight)
        if self.training:  # the gradients of a matrix product are many times faster than a convolution's
            return F.linear(x.flatten(1), weight.flatten(1), layer.bias)[..., None, None]
        return F.conv2d(x, weight, layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, C, 1, 1) → attention (N, C, 1, 1) in [0, 1]."""
        reduce, expand = cast(nn.Conv2d, self.se[1]), cast(nn.Conv2d, self.se[3])
        hidden = self.hidden(F.relu(self._values(self.pooled(pooled), reduce)))
        logits = self.logits(self._values(hidden, expand))
        attention: Tensor = self.attention(torch.sigmoid(logits))
        return attention
