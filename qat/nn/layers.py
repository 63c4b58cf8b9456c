"""The parts of a BNext network: stem, binary sub-blocks, blocks (arXiv 2211.12933).

Attribute names follow the published checkpoints, so that their keys load as they are. Shapes are
(N, C, H, W) throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.ops import pooling
from qat.ops.batch_norm import BatchNorm2d
from qat.ops.binary import BINARY_TEMPERATURE, LATENT_CLIP, binarize_activation, binarize_weight, lies_within
from qat.ops.convolution import binary_conv2d, training_conv2d
from qat.ops.norm_activation import can_fuse, norm_prelu, prelu, scaled_norm, shifted_sign
from qat.ops.pooling import moments

Kind = Literal["scale", "bias"]
#: Channel reduction inside the channel attention (SE).
SE_REDUCTION = 8


def pool2x2(x: Tensor) -> Tensor:
    """2×2 average pooling with stride 2 after edge replication to even sides.

    (N, C, H, W) → (N, C, ⌈H/2⌉, ⌈W/2⌉): the size that a padded 3×3 convolution of stride 2 gives.
    """
    return pooling.pool2x2(pad_to_even(x))


def pad_to_even(x: Tensor) -> Tensor:
    """Replicate the last row and column where a side is odd; even sides pass through."""
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
        """Draw the latent weights at random."""
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, kernel_size // 2
        self.weight = nn.Parameter(torch.empty(channels, channels, kernel_size, kernel_size))
        # Small next to the learning rate's reach, so that training can flip any sign.
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.register_buffer("temperature", torch.ones(1))

    def is_binary(self) -> bool:
        """Whether the weights used are exactly ±1, that is the temperature lies below 1e-7."""
        return float(self.temperature) < BINARY_TEMPERATURE

    def effective_weight(self) -> Tensor:
        """The weights the convolution uses, (C, C, k, k)."""
        return binarize_weight(self.weight, float(self.temperature))

    def forward(self, signs: Tensor) -> Tensor:
        """(N, C, H, W) of signs → (N, C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        # Weights that need no clamping are left alone, since a graph of an earlier pass may hold them.
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
    """Channel attention: ``σ(W3 · relu(W1 · m + b1) + b3)`` of a pooled vector ``m``."""

    def __init__(self, channels: int) -> None:
        """Take the width of ``m``; the layer between is narrower by `SE_REDUCTION`."""
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


class SubBlock(nn.Module):
    """One binary convolution with its normalization, activation, attention and residual.

    With pooled input ``p``, ``y = PReLU2(BN1(conv(sign(x + bias))))``,
    ``a = SE(scale · mean(p) + (1 − scale) · mean(y))``:

    - bias kind (and every 1×1): ``BN2(a ⊙ y) + p``
    - scale kind: ``BN2(a ⊙ y ⊙ r) + r`` with ``r`` the pooled ``PReLU1(x)``

    Without information recoupling ``a = 1``, and the bias kind is ``y + p``.
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
        """The mix scale in [0, 1], (1, C, 1, 1); kept there in place while training."""
        if self.training:
            with torch.no_grad():
                self.scale.clamp_(0.0, 1.0)
            return self.scale
        return self.scale.clamp(0.0, 1.0)

    def mix_means(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of ``scale · pooled(x) + (1 − scale) · y``, taken from the two means: (N, C, 1, 1)."""
        scale = self.mix_scale()
        x = pad_to_even(x) if self.stride == 2 else x
        return scale * spatial_mean(x) + (1 - scale) * spatial_mean(y)

    def pool(self, x: Tensor) -> Tensor:
        """``x`` at the resolution of the sub-block's output."""
        return pool2x2(x) if self.stride == 2 else x

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        if can_fuse(self.norm1) and can_fuse(self.norm2):
            return self._forward_fused(x)
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

    def _forward_fused(self, x: Tensor) -> Tensor:
        """The same with batch statistics, in few passes over memory."""
        signs = shifted_sign(x, self.move.bias, self.binary_activation.zero_is_positive)
        y = norm_prelu(self.binary_conv(signs), self.norm1, self.activation2)
        scale_kind = self.kind == "scale"
        residual = self.pool(prelu(x, self.activation1.weight) if scale_kind else x)
        if not (scale_kind or self.infor_recoupling):
            return y + residual
        branch = y * residual if scale_kind else y
        mean, variance = moments(branch)
        attention = torch.ones_like(mean)
        if self.infor_recoupling:
            scale = self.mix_scale().flatten()
            x_mean = pooling.spatial_mean(pad_to_even(x) if self.stride == 2 else x)
            y_mean = pooling.spatial_mean(y) if scale_kind else mean
            attention = self.se.vector(scale * x_mean + (1 - scale) * y_mean)
        return scaled_norm(branch, attention, mean, variance, self.norm2, residual)


def bounded(model: nn.Module) -> Iterator[tuple[Tensor, float, float]]:
    """Parameters that a training pass keeps within bounds, in place, before it uses them; and the bounds."""
    for module in model.modules():
        if isinstance(module, BinaryConv2d) and module.weight.requires_grad:
            yield module.weight, -LATENT_CLIP, LATENT_CLIP
        elif isinstance(module, SubBlock) and module.infor_recoupling:
            yield module.scale, 0.0, 1.0


class Stem(nn.Module):
    """``BN(conv3×3(image))``, in float32 until it is quantized. ``prelu`` is in the state dict, unused."""

    def __init__(self, channels: int, stride: int) -> None:
        """Make a stem from 3 colours to ``channels``."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        #: Slot of the trunk quantizer.
        self.trunk: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        out: Tensor = self.trunk(self.bn1(self.conv1(x)))
        return out


class Block(nn.Module):
    """A 3×3 sub-block, then one 1×1 sub-block, or two whose outputs are concatenated (width doubles)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        kind: Kind,
        elm_attention: bool = True,
        infor_recoupling: bool = True,
    ) -> None:
        """Make a block; ``kind`` is that of its 3×3 sub-block, "bias" without ``elm_attention``."""
        super().__init__()
        if not elm_attention:
            kind = "bias"
        #: Child names: the 3×3 sub-block, then the 1×1 ones, as the published checkpoints call them.
        self.spatial_name = "Attention" if elm_attention else "FFN_3x3"
        self.pointwise_names = ("FFN",) if in_channels == out_channels else ("FFN_1", "FFN_2")
        self.add_module(self.spatial_name, SubBlock(in_channels, 3, stride, kind, infor_recoupling))
        #: Slots of the trunk quantizers after the 3×3 sub-block and after the block.
        self.trunk_mid: nn.Module = nn.Identity()
        for name in self.pointwise_names:
            self.add_module(name, SubBlock(in_channels, 1, 1, "bias", infor_recoupling))
        self.trunk_out: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C or 2C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        x = self.trunk_mid(self.get_submodule(self.spatial_name)(x))
        outs = [self.get_submodule(name)(x) for name in self.pointwise_names]
        out: Tensor = self.trunk_out(outs[0] if len(outs) == 1 else torch.cat(outs, dim=1))
        return out
