"""The binary sub-block in training, computed with few passes over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.nn.layers import pad_to_even
from qat.nn.sub_block import SubBlock
from qat.ops.batch_norm import takes_batch_statistics
from qat.ops.binary import shifted_sign
from qat.ops.norm_prelu import norm_prelu
from qat.ops.pooling import moments, spatial_mean
from qat.ops.prelu import prelu
from qat.ops.scale_add import scaled_norm_add


class FusedSubBlock(SubBlock):
    """A faster :class:`qat.nn.sub_block.SubBlock`, which computes the same up to rounding.

    With batch statistics, each batch normalization is computed in one pass with the operations before and
    after it. BN2's statistics are computed from the moments of ``y`` in each image, so that the product
    ``a ⊙ y`` is never written to memory. In other cases the plain form is used.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        if not (takes_batch_statistics(self.norm1) and takes_batch_statistics(self.norm2)):
            return super().forward(x)
        signs = shifted_sign(x, self.move.bias, self.binary_activation.zero_is_positive)
        y = norm_prelu(self.binary_conv(signs), self.norm1, self.activation2.weight)
        scale_kind = self.kind == "scale"
        residual = self.pool(prelu(x, self.activation1.weight) if scale_kind else x)
        if not (scale_kind or self.infor_recoupling):
            return y + residual
        branch = y * residual if scale_kind else y
        mean, variance = moments(branch)
        attention = torch.ones_like(mean)
        if self.infor_recoupling:
            scale = self.mix_scale().flatten()
            x_mean = spatial_mean(pad_to_even(x) if self.stride == 2 else x)
            y_mean = spatial_mean(y) if scale_kind else mean
            attention = self.se.vector(scale * x_mean + (1 - scale) * y_mean)
        return scaled_norm_add(branch, attention, mean, variance, self.norm2, residual)
