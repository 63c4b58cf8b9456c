"""The fake-quantized channel attention (SE) of a sub-block.

With the pooled vector ``m``, every ``Q`` a quantization point on a grid of its own::

    h = Q_hidden(relu(W1 · Q_pooled(m) + b1))    z = Q_logits(W3 · h + b3)    a = Q_attention(σ(z))

The logits are quantized too: then the sigmoid is a function of one 8-bit integer, a table of 256 entries,
which every runtime computes exactly.
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
    """Both layers of the channel attention, and the sigmoid's table (256,)."""

    reduce: LayerIntegers
    expand: LayerIntegers
    table: Tensor


class FakeQuantSqueezeExcitation(SqueezeExcitation):
    """Channel attention with 8-bit vectors and weights throughout."""

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
        """Whether every vector's grid is known."""
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
        """The attention by integers alone.

        Args:
            pooled: (N, C, 1, 1), in steps of its grid, not yet rounded.

        Returns:
            (N, C, 1, 1), in steps of the attention's grid.
        """
        constants = integers_of(self)
        q = cast(ActivationQuantizer, self.pooled).saturate(pooled)
        for layer, point in ((constants.reduce, self.hidden), (constants.expand, self.logits)):
            # float64: a sum of thousands of products can pass 2**24.
            accumulator = F.conv2d(q.double(), layer.weight.double())
            q = cast(ActivationQuantizer, point).saturate(layer.requantization(accumulator))
        # An index can't be NaN or infinite. The last term keeps what is not finite visible to the caller.
        return constants.table[(q + 128).nan_to_num(0.0, 0.0, 0.0).long()] + 0.0 * q.float()

    def _values(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        weight = self.weight_quantizer(layer.weight)
        if (
            self.training
        ):  # as a product of matrices, whose gradients are many times faster than a convolution's
            return F.linear(x.flatten(1), weight.flatten(1), layer.bias)[..., None, None]
        return F.conv2d(x, weight, layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, C, 1, 1) → attention (N, C, 1, 1) in [0, 1]."""
        reduce, expand = cast(nn.Conv2d, self.se[1]), cast(nn.Conv2d, self.se[3])
        hidden = self.hidden(F.relu(self._values(self.pooled(pooled), reduce)))
        logits = self.logits(self._values(hidden, expand))
        attention: Tensor = self.attention(torch.sigmoid(logits))
        return attention
