"""BNext-Tiny written plainly, as binary networks are commonly published: the baseline of `make bench-train`.

Binarization has a straight-through gradient by `detach`, every tensor in the paper's formulas
(arXiv 2211.12933) is computed, and the optimizer is torch's AdamW without fusion. Parameters have the
published names, so that the network loads the state dict of :class:`qat.models.bnext.BNext`, and both can be
compared step by step.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.models.bnext import WIDTHS


class Bias(nn.Module):
    """``x + bias`` with a learned bias per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.expand_as(x)


class Sign(nn.Module):
    """The sign, whose gradient is that of the identity where |x| < 1.5, else 0."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        clipped = torch.clamp(x, -1.5, 1.5)
        return torch.sign(x).detach() - clipped.detach() + clipped


class Conv(nn.Module):
    """Convolution with weights that are binarized from latent weights."""

    temperature: Tensor

    def __init__(self, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, kernel_size // 2
        self.weight = nn.Parameter(torch.randn(channels, channels, kernel_size, kernel_size) * 0.01)
        self.register_buffer("temperature", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.weight.data.clamp_(-1.5, 1.5)
        weight = self.weight
        if self.temperature < 1e-7:
            binary = torch.sign(weight)
        else:
            binary = torch.clamp(weight / self.temperature, -1, 1)
        used = binary.detach() - weight.detach() + weight
        return F.conv2d(x, used, stride=self.stride, padding=self.padding)


class Attention(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 8, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 8, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.se(x)
        return result


class SubBlock(nn.Module):
    """One binary convolution with everything around it."""

    def __init__(self, channels: int, kernel_size: int, stride: int, scale_kind: bool) -> None:
        super().__init__()
        self.scale_kind = scale_kind
        self.move = Bias(channels)
        self.binary_activation = Sign()
        self.binary_conv = Conv(channels, kernel_size, stride)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.activation1, self.activation2 = nn.PReLU(channels), nn.PReLU(channels)
        self.pooling = nn.AvgPool2d(2, 2) if stride == 2 else nn.Identity()
        self.scale = nn.Parameter(torch.full((1, channels, 1, 1), 0.5))
        self.se = Attention(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.pooling(self.activation1(x)) if self.scale_kind else self.pooling(x)
        mixed = self.pooling(x)
        y = self.activation2(self.norm1(self.binary_conv(self.binary_activation(self.move(x)))))
        if self.training:
            self.scale.data.clamp_(0, 1)
        mixed = self.scale * mixed + (1 - self.scale) * y
        y = self.se(mixed) * y
        if self.scale_kind:
            y = y * residual
        out: Tensor = self.norm2(y) + residual
        return out


class Block(nn.Module):
    """A 3×3 sub-block and one or two 1×1 sub-blocks."""

    def __init__(self, channels: int, out_channels: int, stride: int, scale_kind: bool) -> None:
        super().__init__()
        self.Attention = SubBlock(channels, 3, stride, scale_kind)
        self.names = ["FFN"] if out_channels == channels else ["FFN_1", "FFN_2"]
        for name in self.names:
            self.add_module(name, SubBlock(channels, 1, 1, False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.Attention(x)
        return torch.cat([self.get_submodule(name)(x) for name in self.names], dim=1)


class Stem(nn.Module):
    """Convolution and batch normalization; the PReLU is never used."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.bn1(self.conv1(x))
        return result


class PlainBNext(nn.Module):
    """The whole network."""

    def __init__(self, num_classes: int, size: str = "tiny") -> None:
        super().__init__()
        widths = WIDTHS[size]
        features: list[nn.Module] = [Stem(widths[0], 2 if num_classes == 1000 else 1)]
        for index, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if index >= 2 and after != before else 1
            features.append(Block(before, after, stride, index % 2 == 0))
        self.feature = nn.Sequential(*features)
        self.prelu = nn.PReLU(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.prelu(self.feature(x)), 1)
        logits: Tensor = self.fc(x.view(x.shape[0], -1))
        return logits


def optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW, which updates one parameter after the other."""
    return torch.optim.AdamW(model.parameters(), lr=lr, foreach=False)
