"""The layers that BNext is made of (arXiv 2211.12933).

Attribute names follow the published checkpoints, so that their keys load as they are. Shapes are
(N, C, H, W) throughout.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.ops import pooling
from qat.ops.batch_norm import BatchNorm2d
from qat.ops.binary import BINARY_TEMPERATURE, LATENT_CLIP, binarize_activation, binarize_weight, lies_within
from qat.ops.convolution import binary_conv2d, training_conv2d

#: Factor by which the hidden vector of the channel attention (SE) has fewer channels than its input.
SE_REDUCTION = 8


def pool2x2(x: Tensor) -> Tensor:
    """2×2 average pooling with stride 2. Odd sides are made even by repeating the last row or column.

    (N, C, H, W) → (N, C, ⌈H/2⌉, ⌈W/2⌉), the size of the result of a padded 3×3 convolution of stride 2.
    """
    return pooling.pool2x2(pad_to_even(x))


def pad_to_even(x: Tensor) -> Tensor:
    """Repeat the last row if H is odd, and the last column if W is odd: (N, C, H, W), both sides even."""
    height, width = x.shape[-2:]
    if height % 2 or width % 2:
        return F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
    return x


def spatial_mean(x: Tensor) -> Tensor:
    """Mean over height and width: (N, C, H, W) → (N, C, 1, 1)."""
    return pooling.spatial_mean(x)[..., None, None]


class GlobalAveragePool(nn.Module):
    """Mean over the image: (N, C, H, W) → (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C)."""
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class LearnableBias(nn.Module):
    """Adds one learned bias per channel before the sign."""

    def __init__(self, channels: int) -> None:
        """Start at zero."""
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → same shape."""
        return x + self.bias


class BinaryActivation(nn.Module):
    """Sign with a straight-through gradient; see :func:`qat.ops.binary.binarize_activation`.

    The temperature is part of the published state dicts and has no effect on the activation.
    """

    temperature: Tensor

    def __init__(self, zero_is_positive: bool = False) -> None:
        """Take the sign of 0: +1 if ``zero_is_positive``, else 0."""
        super().__init__()
        self.zero_is_positive = zero_is_positive
        self.register_buffer("temperature", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → same shape, values in {-1, +1} (or 0 for 0, see ``zero_is_positive``)."""
        return binarize_activation(x, self.zero_is_positive)


class BinaryConv2d(nn.Module):
    """k×k convolution, C→C, whose weights are binarized from latent weights; pads with zeros."""

    temperature: Tensor

    def __init__(self, channels: int, kernel_size: int, stride: int) -> None:
        """Draw the latent weights at random, as torch does for a convolution."""
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, kernel_size // 2
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel_size, kernel_size))
        # Latent weights begin so small that the optimizer's steps can flip any sign.
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.register_buffer("temperature", torch.ones(1))

    def is_binary(self) -> bool:
        """Whether the weights in use are exactly ±1, since the temperature is below 1e-7."""
        return float(self.temperature) < BINARY_TEMPERATURE

    def effective_weight(self) -> Tensor:
        """The weights in use, binarized from the latent ones at the present temperature: (C, C, k, k)."""
        return binarize_weight(self.weight, float(self.temperature))

    def forward(self, signs: Tensor) -> Tensor:
        """Signs (N, C, H, W) → sums of products (N, C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        # Weights are changed in place only if one is out of bounds: autograd may still hold them for the
        # backward pass of an earlier batch.
        if self.training and self.weight.requires_grad and not lies_within(self.weight.detach(), LATENT_CLIP):
            with torch.no_grad():
                self.weight.clamp_(-LATENT_CLIP, LATENT_CLIP)
        weight, binary = self.effective_weight(), self.is_binary()
        if self.training:
            return training_conv2d(signs, weight, self.stride, binary)
        if binary:
            return binary_conv2d(signs, weight, self.stride)
        return F.conv2d(signs, weight, stride=self.stride, padding=self.padding)


class SqueezeExcitation(nn.Module):
    """Channel attention ``σ(W3 · relu(W1 · m + b1) + b3)`` of a pooled vector ``m``.

    Squeeze and excitation (Hu et al. 2018, arXiv 1709.01507); the caller does the pooling.
    """

    def __init__(self, channels: int) -> None:
        """Make both layers for ``channels`` of ``m``, with :data:`SE_REDUCTION` times fewer in between."""
        super().__init__()
        hidden = max(channels // SE_REDUCTION, 1)
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def vector(self, pooled: Tensor) -> Tensor:
        """(N, C) → attention (N, C) in (0, 1)."""
        reduce, expand = cast(nn.Conv2d, self.se[1]), cast(nn.Conv2d, self.se[3])
        hidden = F.relu(F.linear(pooled, reduce.weight.flatten(1), reduce.bias))
        return torch.sigmoid(F.linear(hidden, expand.weight.flatten(1), expand.bias))

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, C, 1, 1) → attention (N, C, 1, 1) in (0, 1)."""
        attention: Tensor = self.se(pooled)
        return attention


class Stem(nn.Module):
    """``BN(conv3×3(image))``. ``prelu`` is not used, but is in the published state dicts."""

    def __init__(self, channels: int, stride: int) -> None:
        """Make a stem from 3 colours to ``channels``."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        #: Place of the trunk's first quantizer; preparation sets it.
        self.trunk: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        out: Tensor = self.trunk(self.bn1(self.conv1(x)))
        return out
