"""A block: a 3×3 sub-block and the 1×1 sub-blocks after it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qat.nn.fused_sub_block import FusedSubBlock
from qat.nn.layers import BinaryConv2d
from qat.nn.sub_block import Kind, SubBlock
from qat.ops.binary import LATENT_CLIP


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
        """Make a block. ``kind`` is that of its 3×3 sub-block, always "bias" without ``elm_attention``."""
        super().__init__()
        if not elm_attention:
            kind = "bias"
        #: Child names: the 3×3 sub-block, then the 1×1 ones, as the published checkpoints call them.
        self.spatial_name = "Attention" if elm_attention else "FFN_3x3"
        self.pointwise_names = ("FFN",) if in_channels == out_channels else ("FFN_1", "FFN_2")
        self.add_module(self.spatial_name, FusedSubBlock(in_channels, 3, stride, kind, infor_recoupling))
        #: Places of the trunk's quantizers, which preparation sets: after the 3×3 sub-block, after the block.
        self.trunk_mid: nn.Module = nn.Identity()
        for name in self.pointwise_names:
            self.add_module(name, FusedSubBlock(in_channels, 1, 1, "bias", infor_recoupling))
        self.trunk_out: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C or 2C, ⌈H/stride⌉, ⌈W/stride⌉)."""
        x = self.trunk_mid(self.get_submodule(self.spatial_name)(x))
        outs = [self.get_submodule(name)(x) for name in self.pointwise_names]
        out: Tensor = self.trunk_out(outs[0] if len(outs) == 1 else torch.cat(outs, dim=1))
        return out


def bounded(model: nn.Module) -> Iterator[tuple[Tensor, float, float]]:
    """The parameters that a training step clamps in place before it uses them, each with its two bounds."""
    for module in model.modules():
        if isinstance(module, BinaryConv2d) and module.weight.requires_grad:
            yield module.weight, -LATENT_CLIP, LATENT_CLIP
        elif isinstance(module, SubBlock) and module.infor_recoupling:
            yield module.scale, 0.0, 1.0
