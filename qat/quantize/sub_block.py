"""The fake-quantized sub-block: its formula, which training computes step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.nn.layers import pool2x2
from qat.ops.batch_norm import gain_and_offset
from qat.ops.binary import shifted_sign
from qat.ops.norm_prelu import quantized_norm_prelu
from qat.ops.planes import without_autocast
from qat.ops.prelu import prelu
from qat.ops.scale_add import quantized_scale_add
from qat.quantize.activation_quantizers import fake_quantize_symmetric
from qat.quantize.constant_cache import integers_of
from qat.quantize.folding import CONSTANT_BITS
from qat.quantize.integer_sub_block import computes_integers, integer_sub_block
from qat.quantize.sub_block_constants import SubBlockIntegers, sub_block_integers
from qat.quantize.sub_block_points import SubBlockPoints


class FakeQuantSubBlock(SubBlockPoints):
    """A sub-block whose values all lie on grids of integers.

    The input ``x`` lies on the trunk's grid. ``Q`` is a quantization point with its own grid, and ``[·]_q``
    rounds to the grid of ``q``, which another point has::

        s = sign(x + bias)                                        sign(0) = +1
        y = [PReLU2(Q_y(BN1(conv(s, ±1))))]_y
        r = x, or [PReLU1(x)]_x (scale kind); with stride 2 [pool(r)]_x
        a = SE(scale · mean(x) + (1 − scale) · mean(y))           1 without information recoupling
        g = Q_gain(a · A2)                                        BN2(v) = A2 · v + B2
        t = Q_branch(g ⊙ y), or Q_branch(Q_product(g ⊙ y) ⊙ r)    (scale kind)
        out = [t + [B2]_branch]_branch + r                        y + r without BN2

    BN1's result is quantized before PReLU2, so that PReLU2 is a function of one integer, which every runtime
    computes exactly. Gradients pass the rounding straight through. The trunk's next quantizer, which puts
    ``out`` on a grid, belongs to the block around. In evaluation, the sub-block computes the same with
    integers: see :mod:`qat.quantize.integer_sub_block`.
    """

    def integers(self) -> SubBlockIntegers:
        """Constants of the integer sub-block."""
        return sub_block_integers(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        if computes_integers(self):
            with without_autocast(x):  # autocast would round the sums of integers
                return integer_sub_block(self, integers_of(self), x)
        signs = shifted_sign(x, self.move.bias, zero_is_positive=True)
        y = quantized_norm_prelu(self.binary_conv(signs), self.norm1, self.slope(self.activation2), self.y)
        trunk, scale_kind = self.source.quantizer, self.kind == "scale"
        residual = prelu(x, self.slope(self.activation1), trunk) if scale_kind else x
        if self.stride == 2:
            residual = trunk.requantize(pool2x2(residual), overwrite=True)
        if not self.has_branch:
            return y + residual
        attention = (
            self.se(self.mix_means(x, y)) if self.infor_recoupling else torch.ones_like(self.move.bias)
        )
        norm, multiplied = self.norm2, residual if scale_kind else None
        gain2, offset2 = (
            constant.to(norm.weight.dtype).view(1, -1, 1, 1)
            for constant in gain_and_offset(norm, attention.flatten(1), y, multiplied)
        )
        gain, product = self._gain(attention, gain2), self.product if scale_kind else None
        return quantized_scale_add(y, gain.flatten(1), offset2.flatten(), residual, self.branch, product)

    def _gain(self, attention: Tensor, gain2: Tensor) -> Tensor:
        """``Q_gain(a · A2)``: (N, C, 1, 1), or (1, C, 1, 1) without attention."""
        gain = attention * gain2
        if self.gain.enabled:
            quantized: Tensor = self.gain(gain)
            return quantized
        return fake_quantize_symmetric(gain, self.gain_step(gain2), CONSTANT_BITS) if self.quantized else gain
