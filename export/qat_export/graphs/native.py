"""The native target: an ONNX graph whose trunk is computed by this project's own operators in onnxruntime.

The operators (domain ``bnext_qat``, sources in ``qat/native/src``, described in docs/native.md) work on
channels-last int8 tensors; a sub-block is three of them: BinaryConv, ChannelAttention, TrunkUpdate. Image and
classifier stay in standard operators. It computes what the portable graph computes, integer for integer, and
needs the library registered: see :mod:`qat_export.nativelibrary`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from qat import __version__
from qat.errors import QuantizationError
from qat.grid import Grid
from qat_export.graphs.builder import FLOAT, UINT8, GraphBuilder, shorten_names, tensor_info
from qat_export.graphs.metadata import INPUT, OUTPUT
from qat_export.graphs.operators import IntegerOperators, per_pixel
from qat_export.graphs.pixels import fold_normalization
from qat_export.graphs.portable import OPSET, InputKind, network_metadata
from qat_export.integer.network import Attention, BinaryConv, IntegerNetwork, Slopes, SubBlock
from qat_export.nativelibrary import DOMAIN

#: Version of the operators' domain.
DOMAIN_VERSION: Final = 1
#: Metadata property ``format``.
FORMAT: Final = "bnext-qat native 1"
#: Endings of the names of weights.
_WEIGHTS: Final = (".bits", ".weight")


def emit_native(
    network: IntegerNetwork, image_size: int | None = None, *, input_kind: InputKind = "float32 NCHW"
) -> onnx.ModelProto:
    """The native ONNX model of ``network``; arguments and images as in `emit_portable`.

    Raises:
        QuantizationError: an image size below 1, or a normalization that can't be folded into pixels exactly.
    """
    size = network.image_size if image_size is None else image_size
    if size < 1:
        raise QuantizationError(f"an image size of {size}; allowed: 1 or more")
    builder = GraphBuilder()
    _Walk(builder, network, size, input_kind)
    shape: tuple[int, ...] = (size, size, 3) if input_kind == "uint8 NHWC" else (3, size, size)
    model = builder.model(
        "bnext",
        [tensor_info(INPUT, FLOAT if input_kind == "float32 NCHW" else UINT8, ["batch", *shape])],
        [tensor_info(OUTPUT, FLOAT, ["batch", len(network.class_names)])],
        opset=OPSET,
        domains={DOMAIN: DOMAIN_VERSION},
        metadata=network_metadata(FORMAT, network, size, input_kind),
        description=f"{network}\nThe trunk is int8, channels last; metadata 'grids' has the scales.\n"
        f"Needs the operators of domain {DOMAIN}.",
        producer_version=__version__,
    )
    named = {"image/uint8", *network.grids}
    shorten_names(model, lambda name: name in named or name.endswith(_WEIGHTS))
    return model


def packed_weight(conv: BinaryConv) -> NDArray[np.uint8]:
    """The signs as the operator reads them: (O, k, k, ceil(I / 8)), 1 is +1, channel 0 the lowest bit."""
    positive = (conv.weight() > 0).transpose(0, 2, 3, 1)
    return np.packbits(positive, axis=-1, bitorder="little")


def _bounds(grid: Grid, name: str = "") -> dict[str, int]:
    """Attributes with the smallest and the largest integer of a grid."""
    prefix = f"{name}_" if name else ""
    return {f"{prefix}low": grid.low, f"{prefix}high": grid.high}


class _Walk:
    """Walks the network once, in forward order."""

    def __init__(
        self, builder: GraphBuilder, network: IntegerNetwork, size: int, input_kind: InputKind
    ) -> None:
        self.builder, self.operators = builder, IntegerOperators(builder)
        side = -(-size // network.stem.stride)
        x = self.stem(network, input_kind)
        for block in network.blocks:
            spatial, name = block.spatial, f"{block.name}/trunk_out"
            x = self.sub_block(
                spatial, x, block.input_grid, block.middle_grid, side, f"{block.name}/trunk_mid"
            )
            side = -(-side // spatial.conv.stride)
            if len(block.pointwise) == 1:
                x = self.sub_block(block.pointwise[0], x, block.middle_grid, block.output_grid, side, name)
            else:
                parts = [
                    self.sub_block(sub, x, block.middle_grid, block.output_grid, side, f"{sub.name}/out")
                    for sub in block.pointwise
                ]
                x = self.builder.node("Concat", parts, name, axis=3)
        self.head(network, x, side)

    def stem(self, network: IntegerNetwork, input_kind: InputKind) -> str:
        """From the graph's input to the first trunk tensor."""
        image, conv = network.stem.image, network.stem.conv
        if input_kind == "float32 NCHW":
            x = self.operators.image(image, "image/uint8")
        else:
            last = input_kind == "uint8 NHWC"
            gain, offset = fold_normalization(network)
            x = self.operators.raw_image(image, gain, offset, "image/uint8", channels_last=last)
        name = "feature.0/trunk"
        constants: dict[str, NDArray[Any]] = {
            "weight": conv.weight,
            "bias": conv.bias,
            "multiplier": conv.multiplier,
        }
        return self.builder.custom(
            DOMAIN,
            "Stem",
            [x, *(self.builder.constant(value, f"{name}.{key}") for key, value in constants.items())],
            [name],
            stride=network.stem.stride,
            zero_point=image.zero_point,
            **_bounds(network.stem_grid),
        )

    def sub_block(
        self, sub: SubBlock, x: str, source: Grid, output: Grid, side: int, output_name: str
    ) -> str:
        """One sub-block; see :class:`qat_export.integer.reference.Interpreter`."""
        name, conv, attention = sub.name, sub.conv, sub.attention
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
            out_side = -(-side // conv.stride)
            in_side = side + side % 2 if conv.stride == 2 else side
            gain = self.attention(attention, name, in_side**2, out_side**2)
        elif sub.branch is not None:
            assert sub.branch.gain is not None
            gain = self.builder.constant(sub.branch.gain.reshape(1, -1), f"{name}/gain")
        if sub.branch is not None:
            offset = self.builder.constant(sub.branch.offset, f"{name}/offset")
        if sub.residual_slopes is not None:
            residual_slopes = self.slopes(sub.residual_slopes, f"{name}/residual_slopes")
        return self.builder.custom(
            DOMAIN,
            "TrunkUpdate",
            [y, x, gain, offset, residual_slopes],
            [output_name],
            **self.update_attributes(sub, source, output),
        )

    @staticmethod
    def update_attributes(sub: SubBlock, source: Grid, output: Grid) -> dict[str, int | float]:
        """Attributes of a TrunkUpdate; those that its inputs leave without use are 0."""
        attributes: dict[str, int | float] = {
            "stride": sub.conv.stride,
            "scales": 0,
            "first": 0.0,
            "second": 0.0,
            "branch_multiplier": sub.branch_multiplier.value,
            "residual_multiplier": sub.residual_multiplier.value,
            "residual_shift": 0 if sub.residual_slopes is None else sub.residual_slopes.shift,
        }
        nothing = dict.fromkeys(("product_low", "product_high", "branch_low", "branch_high"), 0)
        attributes |= nothing | _bounds(source, "residual") | _bounds(output)
        if sub.branch is not None:
            attributes |= _bounds(sub.branch.grid, "branch") | {"first": sub.branch.first.value}
            if sub.branch.product is not None and sub.branch.second is not None:
                attributes |= _bounds(sub.branch.product, "product")
                attributes |= {"scales": 1, "second": sub.branch.second.value}
        return attributes

    def slopes(self, slopes: Slopes, name: str) -> str:
        """Name of a constant."""
        return self.builder.constant(slopes.integers, name)

    def attention(self, attention: Attention, name: str, in_pixels: int, out_pixels: int) -> str:
        """The gain of each channel, (N, C) int8, from the sums that the sub-block's BinaryConv gives."""
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

    def head(self, network: IntegerNetwork, x: str, side: int) -> None:
        """PReLU, mean, classifier."""
        head, grid = network.head, network.blocks[-1].output_grid
        total = self.builder.custom(
            DOMAIN,
            "ChannelSums",
            [x, self.slopes(head.slopes, "head/slopes")],
            ["head/sum"],
            slope_shift=head.slopes.shift,
            **_bounds(grid),
        )
        factor = self.builder.constant(per_pixel(np.asarray(head.mean), side**2))
        mean = self.builder.node("DequantizeLinear", [total, factor], "head/mean")
        self.operators.classifier(
            self.operators.integer(mean, head.input, "head/input"), head.classifier, OUTPUT
        )
