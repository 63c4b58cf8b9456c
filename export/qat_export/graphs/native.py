"""The native target: an ONNX graph whose trunk is computed by this project's own operators in onnxruntime.

The operators (domain ``bnext_qat``, sources in ``qat/native/src``, described in docs/native.md) work on int8
tensors with channels last. A sub-block consists of three of them: BinaryConv, ChannelAttention, TrunkUpdate.
Image and classifier use standard operators. The graph computes the same integers as the portable one. To run
it, the operators' library must be registered, see :mod:`qat_export.nativelibrary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from qat.grid import Grid
from qat_export.graphs.builder import GraphBuilder
from qat_export.graphs.integer_emitter import IntegerEmitter, PlacedSubBlock
from qat_export.graphs.metadata import InputKind
from qat_export.graphs.operators import IntegerOperators, per_pixel
from qat_export.graphs.walk import side_behind
from qat_export.integer.network import Attention, BinaryConv, Head, IntegerNetwork, Slopes, SubBlock
from qat_export.nativelibrary import DOMAIN

#: Version of the operators' domain.
DOMAIN_VERSION: Final = 1
#: Metadata property ``format``.
FORMAT: Final = "bnext-qat native 1"


def emit_native(
    network: IntegerNetwork, image_size: int | None = None, *, input_kind: InputKind = "float32 NCHW"
) -> onnx.ModelProto:
    """The native ONNX model of ``network``: images (batch, 3, S, S), or (batch, S, S, 3) → float32 logits.

    Args:
        network: the integer network.
        image_size: side ``S`` in pixels; ``None`` means ``network.image_size``.
        input_kind: type and layout of the images.

    Raises:
        QuantizationError: the image size is below 1, or the normalization can't be folded into raw pixels
            exactly.
    """
    return NativeEmitter(IntegerOperators(GraphBuilder())).model(network, image_size, input_kind)


def packed_weight(conv: BinaryConv) -> NDArray[np.uint8]:
    """The weights' signs in the layout of the operator: uint8 (O, k, k, ⌈I/8⌉).

    A bit of 1 is +1. Input channel 0 is the lowest bit of the first byte.
    """
    positive = (conv.weight() > 0).transpose(0, 2, 3, 1)
    return np.packbits(positive, axis=-1, bitorder="little")


def update_attributes(sub: SubBlock, source: Grid, output: Grid) -> dict[str, int | float]:
    """Attributes of a TrunkUpdate. Those that are not used with the inputs of this sub-block are 0."""
    attributes: dict[str, int | float] = {
        "stride": sub.conv.stride,
        "scales": 0,
        "first": 0.0,
        "second": 0.0,
        "branch_multiplier": sub.branch_multiplier.value,
        "residual_multiplier": sub.residual_multiplier.value,
        "residual_shift": 0 if sub.residual_slopes is None else sub.residual_slopes.shift,
    }
    unused = dict.fromkeys(("product_low", "product_high", "branch_low", "branch_high"), 0)
    attributes |= unused | _bounds(source, "residual") | _bounds(output)
    if sub.branch is not None:
        attributes |= _bounds(sub.branch.grid, "branch") | {"first": sub.branch.first.value}
        if sub.branch.product is not None and sub.branch.second is not None:
            attributes |= _bounds(sub.branch.product, "product")
            attributes |= {"scales": 1, "second": sub.branch.second.value}
    return attributes


def _bounds(grid: Grid, name: str = "") -> dict[str, int]:
    """Attributes with the smallest and the largest integer of a grid."""
    prefix = f"{name}_" if name else ""
    return {f"{prefix}low": grid.low, f"{prefix}high": grid.high}


class NativeEmitter(IntegerEmitter):
    """The network in the operators of domain ``bnext_qat``, trunk tensors with channels last."""

    model_format = FORMAT
    note = (
        "The trunk is int8, channels last; metadata 'grids' has the scales.\n"
        f"Needs the operators of domain {DOMAIN}."
    )
    weight_endings = (".bits", ".weight")
    domains: ClassVar[Mapping[str, int]] = {DOMAIN: DOMAIN_VERSION}
    channel_axis = 3

    def stem(self, network: IntegerNetwork, image: str, output: str) -> str:
        """See the base class."""
        stem = network.stem
        constants: dict[str, NDArray[Any]] = {
            "weight": stem.conv.weight,
            "bias": stem.conv.bias,
            "multiplier": stem.conv.multiplier,
        }
        return self.builder.custom(
            DOMAIN,
            "Stem",
            [image, *(self.builder.constant(value, f"{output}.{key}") for key, value in constants.items())],
            [output],
            stride=stem.stride,
            zero_point=stem.image.zero_point,
            **_bounds(network.stem_grid),
        )

    def sub_block(self, placed: PlacedSubBlock, x: str, side: int, output: str) -> str:
        """See the base class."""
        sub = placed.sub_block
        name, conv, attention, branch = sub.name, sub.conv, sub.attention, sub.branch
        sums = [f"{name}/y_sum", f"{name}/x_sum"] if attention is not None else []
        y = self.builder.custom(
            DOMAIN,
            "BinaryConv",
            [
                x,
                self.builder.constant(packed_weight(conv), f"{name}/binary_weight.bits"),
                self.builder.constant(conv.threshold, f"{name}/threshold"),
                self.builder.constant(conv.bias, f"{name}/bias"),
                self.builder.constant(conv.multiplier, f"{name}/multiplier"),
                self.slopes(sub.slopes, f"{name}/slopes"),
            ],
            [f"{name}/y", *sums],
            stride=conv.stride,
            slope_shift=sub.slopes.shift,
            **_bounds(sub.y_grid),
        )
        gain = offset = residual_slopes = ""
        if attention is not None:
            # At stride 2 and an odd side, the mean counts the last row and column twice, as the pooling of
            # the residual does.
            in_side = side + side % 2 if conv.stride == 2 else side
            gain = self.attention(attention, name, in_side**2, side_behind(side, conv.stride) ** 2)
        elif branch is not None:
            assert branch.gain is not None
            gain = self.builder.constant(branch.gain.reshape(1, -1), f"{name}/gain")
        if branch is not None:
            offset = self.builder.constant(branch.offset, f"{name}/offset")
        if sub.residual_slopes is not None:
            residual_slopes = self.slopes(sub.residual_slopes, f"{name}/residual_slopes")
        return self.builder.custom(
            DOMAIN,
            "TrunkUpdate",
            [y, x, gain, offset, residual_slopes],
            [output],
            **update_attributes(sub, placed.source, placed.output),
        )

    def slopes(self, slopes: Slopes, name: str) -> str:
        """Add the integers of ``slopes`` as a constant; returns its name."""
        return self.builder.constant(slopes.integers, name)

    def attention(self, attention: Attention, name: str, in_pixels: int, out_pixels: int) -> str:
        """Append channel attention; its result is the gain (N, C) int8.

        It reads the sums over the image that the sub-block's BinaryConv computes.
        """
        constants: dict[str, NDArray[Any]] = {
            "x_multiplier": per_pixel(attention.input_mean, in_pixels),
            "y_multiplier": per_pixel(attention.y_mean, out_pixels),
        }
        for part, layer in (("hidden", attention.reduce), ("logits", attention.expand)):
            constants[f"{part}.weight"] = layer.weight.reshape(len(layer.weight), -1)
            constants |= {f"{part}.bias": layer.bias, f"{part}.multiplier": layer.multiplier}
        constants |= {"sigmoid_table": attention.table, "gain.multiplier": attention.gain}
        return self.builder.custom(
            DOMAIN,
            "ChannelAttention",
            [
                f"{name}/x_sum",
                f"{name}/y_sum",
                *(self.builder.constant(value, f"{name}/{key}") for key, value in constants.items()),
            ],
            [f"{name}/gain"],
            **_bounds(attention.pooled, "pooled"),
            **_bounds(attention.hidden, "hidden"),
            **_bounds(attention.logits, "logits"),
        )

    def head_mean(self, head: Head, grid: Grid, x: str, side: int) -> str:
        """See the base class."""
        total = self.builder.custom(
            DOMAIN,
            "ChannelSums",
            [x, self.slopes(head.slopes, "head/slopes")],
            ["head/sum"],
            slope_shift=head.slopes.shift,
            **_bounds(grid),
        )
        factor = self.builder.constant(per_pixel(np.asarray(head.mean), side**2))
        return self.builder.node("DequantizeLinear", [total, factor], "head/mean")
