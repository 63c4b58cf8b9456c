"""The binary sub-block, computed line by line as its formula; the faster form is ``fused_sub_block``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from qat.nn.layers import (
    BinaryActivation,
    BinaryConv2d,
    LearnableBias,
    SqueezeExcitation,
    pad_to_even,
    pool2x2,
    spatial_mean,
)
from qat.ops.batch_norm import BatchNorm2d

Kind = Literal["scale", "bias"]


class SubBlock(nn.Module):
    """One binary convolution with its normalizations, activations, attention and residual.

    With ``p`` the input ``x`` pooled to the size of the output, ``y = PReLU2(BN1(conv(sign(x + bias))))`` and
    ``a = SE(scale · mean(p) + (1 − scale) · mean(y))``, the output is

    - in the bias kind (every 1×1 sub-block is of it): ``BN2(a ⊙ y) + p``
    - in the scale kind: ``BN2(a ⊙ y ⊙ r) + r``, where ``r`` is ``PReLU1(x)``, pooled

    Without information recoupling ``a`` is 1, and the output of the bias kind is ``y + p``. The formulas are
    those of BNext (arXiv 2211.12933) and its published code.
    """

    def __init__(
        self, channels: int, kernel_size: int, stride: int, kind: Kind, infor_recoupling: bool = True
    ) -> None:
        """Make a sub-block that keeps ``channels`` and divides the side by ``stride``."""
        super().__init__()
        self.channels, self.kernel_size, self.stride, self.kind = channels, kernel_size, stride, kind
        self.infor_recoupling = infor_recoupling
        self.move = LearnableBias(channels)
        self.binary_activation = BinaryActivation()
        self.binary_conv = BinaryConv2d(channels, kernel_size, stride)
        self.norm1 = BatchNorm2d(channels)
        self.norm2 = BatchNorm2d(channels)
        self.activation1 = nn.PReLU(channels)
        self.activation2 = nn.PReLU(channels)
        if infor_recoupling:
            self.scale = nn.Parameter(torch.full((1, channels, 1, 1), 0.5))
            self.se = SqueezeExcitation(channels)

    def mix_scale(self) -> Tensor:
        """The mix scale (1, C, 1, 1), clamped to [0, 1]; in training the parameter itself is clamped."""
        if self.training:
            with torch.no_grad():
                self.scale.clamp_(0.0, 1.0)
            return self.scale
        return self.scale.clamp(0.0, 1.0)

    def mix_means(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of ``scale · pooled(x) + (1 − scale) · y`` over the image: (N, C, 1, 1).

        It is computed from the means of ``x`` and ``y``, without the sum of the two tensors.
        """
        scale = self.mix_scale()
        x = pad_to_even(x) if self.stride == 2 else x
        return scale * spatial_mean(x) + (1 - scale) * spatial_mean(y)

    def pool(self, x: Tensor) -> Tensor:
        """``x`` (N, C, H, W) pooled to the size of the sub-block's output."""
        return pool2x2(x) if self.stride == 2 else x

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        signs = self.binary_activation(self.move(x))
        y = self.activation2(self.norm1(self.binary_conv(signs)))
        branch = y
        if self.infor_recoupling:
            branch = self.se(self.mix_means(x, y)) * y
        if self.kind == "scale":
            residual = self.pool(self.activation1(x))
            out: Tensor = self.norm2(branch * residual) + residual
            return out
        residual = self.pool(x)
        out = self.norm2(branch) if self.infor_recoupling else branch
        return out + residual
