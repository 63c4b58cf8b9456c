"""The portable target: an ONNX graph of standard operators that computes an :class:`IntegerNetwork`.

How integers are stored and which operators compute with them is in :mod:`qat_export.graphs.operators`.
Real-world scales are in the metadata (``grids``).
"""

from __future__ import annotations

import json
from typing import Final, Literal, get_args

import numpy as np
import onnx

from qat import __version__
from qat.errors import QuantizationError
from qat.grid import Grid
from qat_export.graphs.builder import FLOAT, UINT8, GraphBuilder, shorten_names, tensor_info
from qat_export.graphs.metadata import INPUT, OUTPUT, model_metadata
from qat_export.graphs.operators import TO_FIRST, TO_LAST, ZERO, IntegerOperators
from qat_export.graphs.pixels import fold_normalization
from qat_export.graphs.strict_operators import StrictOperators
from qat_export.integer.network import Attention, IntegerNetwork, SubBlock

OPSET: Final = 13
#: Endings of the names of weights.
_WEIGHTS: Final = ("/binary_weight", ".bits", ".weight")
#: What a model takes: normalized images, or raw pixels with the normalization folded in.
InputKind = Literal["float32 NCHW", "uint8 NCHW", "uint8 NHWC"]


def kind_of_input(pixel_type: str, layout: str) -> InputKind:
    """The kind of input with this type ("float32", "uint8") and layout ("NCHW", "NHWC").

    Raises:
        ValueError: there is none.
    """
    kinds: tuple[InputKind, ...] = get_args(InputKind)
    for kind in kinds:
        if kind.split() == [pixel_type, layout]:
            return kind
    raise ValueError(f"no input of type {pixel_type} and layout {layout}")


def emit_portable(
    network: IntegerNetwork,
    image_size: int | None = None,
    *,
    input_kind: InputKind = "float32 NCHW",
    strict: bool = False,
) -> onnx.ModelProto:
    """The ONNX model of ``network``: images (batch, 3, S, S), or (batch, S, S, 3) → float32 logits.

    Args:
        network: the lowered network.
        image_size: side ``S``; the size it was trained on by default.
        input_kind: type and layout of the images.
        strict: only operators that every runtime reads alike; the same numbers, slower in onnxruntime.

    Raises:
        QuantizationError: an image size below 1; the normalization can't be folded into raw pixels exactly;
            or, in the strict form, sums too large for float32.
    """
    size = network.image_size if image_size is None else image_size
    if size < 1:
        raise QuantizationError(f"an image size of {size}; allowed: 1 or more")
    builder = GraphBuilder()
    operators = (StrictOperators if strict else IntegerOperators)(builder)
    _Walk(operators, network, size, input_kind)
    shape: tuple[int, ...] = (size, size, 3) if input_kind == "uint8 NHWC" else (3, size, size)
    model = builder.model(
        "bnext",
        [tensor_info(INPUT, FLOAT if input_kind == "float32 NCHW" else UINT8, ["batch", *shape])],
        [tensor_info(OUTPUT, FLOAT, ["batch", len(network.class_names)])],
        opset=OPSET,
        metadata=network_metadata("bnext-qat portable 1", network, size, input_kind),
        description=f"{network}\n"
        f"int8 tensors are uint8 with zero point {ZERO}; metadata 'grids' has the scales.",
        producer_version=__version__,
    )
    named = {"image/uint8", *network.grids}
    shorten_names(model, lambda name: name in named or name.endswith(_WEIGHTS))
    return model


def network_metadata(
    model_format: str, network: IntegerNetwork, size: int, input_kind: InputKind
) -> dict[str, str]:
    """Metadata properties of a graph that computes ``network``; its scales are in ``grids``."""
    grids = {
        name: {"scale": grid.scale, "bits": grid.bits, "signed": grid.signed, "zero_point": grid.zero_point}
        for name, grid in network.grids.items()
    }
    return model_metadata(
        model_format,
        architecture=network.architecture,
        class_names=network.class_names,
        mean=network.mean,
        std=network.std,
        image_size=size,
        facts=network.metadata | {"input": input_kind, "grids": json.dumps(grids, sort_keys=True)},
    )


class _Walk:
    """Walks the network once, in forward order."""

    def __init__(
        self, operators: IntegerOperators, network: IntegerNetwork, size: int, input_kind: InputKind
    ) -> None:
        self.operators, self.builder = operators, operators.builder
        stem = network.stem
        if input_kind == "float32 NCHW":
            x = self.operators.image(stem.image, "image/uint8")
        else:
            last = input_kind == "uint8 NHWC"
            gain, offset = fold_normalization(network)
            x = self.operators.raw_image(stem.image, gain, offset, "image/uint8", channels_last=last)
        x = self.operators.affine_conv(
            x, stem.conv, stem.image, network.stem_grid, "feature.0/trunk", strides=stem.stride, pads=1
        )
        side = -(-size // stem.stride)
        for block in network.blocks:
            x = self.sub_block(
                block.spatial, x, block.input_grid, block.middle_grid, side, f"{block.name}/trunk_mid"
            )
            side = -(-side // block.spatial.conv.stride)
            name = f"{block.name}/trunk_out"
            if len(block.pointwise) == 1:
                x = self.sub_block(block.pointwise[0], x, block.middle_grid, block.output_grid, side, name)
            else:
                parts = [
                    self.sub_block(sub, x, block.middle_grid, block.output_grid, side, f"{sub.name}/out")
                    for sub in block.pointwise
                ]
                x = self.builder.node("Concat", parts, name, axis=1)
        self.head(network, x, side)

    def sub_block(
        self, sub: SubBlock, x: str, source: Grid, output: Grid, side: int, output_name: str
    ) -> str:
        """One sub-block; see :class:`qat_export.integer.reference.Interpreter`."""
        name = sub.name
        out_side = -(-side // sub.conv.stride)
        q = self.operators.binary_conv(x, sub.conv, sub.y_grid, side, f"{name}/conv")
        y = self.operators.prelu(q, sub.slopes, sub.y_grid, out_side, f"{name}/y")
        residual = x
        if sub.residual_slopes is not None:
            residual = self.operators.prelu(x, sub.residual_slopes, source, side, f"{name}/prelu1")
        if sub.conv.stride == 2:
            even = self.operators.pad_to_even(residual, f"{name}/residual.even") if side % 2 else residual
            residual = self.operators.pool2x2(even, sub.conv.channels, f"{name}/residual")
        branch = y
        if sub.branch is not None:
            if sub.attention is not None:
                gain = self.attention(sub.attention, x, y, side, out_side, name)
            else:
                assert sub.branch.gain is not None
                gain = self.operators.vector(sub.branch.gain, out_side, f"{name}/gain")
            factors = (y, sub.branch.first.value), (gain, 1.0)
            if sub.branch.product is not None and sub.branch.second is not None:
                branch = self.operators.binary("Mul", *factors, sub.branch.product, f"{name}/product")
                factors = (branch, sub.branch.second.value), (residual, 1.0)
            branch = self.operators.binary("Mul", *factors, sub.branch.grid, f"{name}/branch")
            offset = self.operators.vector(sub.branch.offset, out_side, f"{name}/offset")
            terms = (branch, 1.0), (offset, 1.0)
            branch = self.operators.binary("Add", *terms, sub.branch.grid, f"{name}/normalized")
        terms = (branch, sub.branch_multiplier.value), (residual, sub.residual_multiplier.value)
        return self.operators.binary("Add", *terms, output, output_name)

    def attention(self, attention: Attention, x: str, y: str, in_side: int, out_side: int, name: str) -> str:
        """Gain vector to broadcast against ``y``, uint8 with zero point 128."""
        channels = len(attention.gain)
        if in_side != out_side and in_side % 2:
            x, in_side = self.operators.pad_to_even(x, f"{name}/even"), in_side + 1
        mix = self.builder.node(
            "Add",
            [
                self.operators.mean(x, channels, in_side**2, attention.input_mean, f"{name}/input_mean"),
                self.operators.mean(y, channels, out_side**2, attention.y_mean, f"{name}/y_mean"),
            ],
            f"{name}/mix",
        )
        pooled = self.operators.integer(mix, attention.pooled, f"{name}/pooled")
        pooled = self.builder.node("Transpose", [pooled], f"{name}/pooled.first", perm=TO_FIRST)
        hidden = self.operators.affine_conv(
            pooled, attention.reduce, attention.pooled, attention.hidden, f"{name}/hidden"
        )
        logits = self.operators.affine_conv(
            hidden, attention.expand, attention.hidden, attention.logits, f"{name}/logits"
        )
        last = self.builder.node("Transpose", [logits], f"{name}/logits.last", perm=TO_LAST)
        index = self.operators.index(last, f"{name}/logits.index")
        # Looked up as float32, since the next factor is one; runtimes convert the table at load.
        stored = self.builder.constant(attention.table, f"{name}/sigmoid_table")
        table = self.builder.node("Cast", [stored], f"{name}/sigmoid_table.real", to=FLOAT)
        share = self.builder.node("Gather", [table, index], f"{name}/attention", axis=0)
        factor = self.builder.constant(attention.gain, f"{name}/gain.multiplier")
        gain = self.builder.node("Mul", [share, factor], f"{name}/gain.real")
        gain = self.operators.integer(gain, Grid(1.0, 8, signed=True), f"{name}/gain")
        return self.operators.image_vector(gain, channels, out_side, f"{name}/gain.first")

    def head(self, network: IntegerNetwork, x: str, side: int) -> None:
        """PReLU, mean, classifier."""
        head = network.head
        layer = head.classifier
        channels = layer.weight.shape[1]
        x = self.operators.prelu(x, head.slopes, network.blocks[-1].output_grid, side, "head/prelu")
        mean = self.operators.mean(
            x, channels, side**2, np.full(channels, head.mean, np.float32), "head/mean"
        )
        pooled = self.operators.integer(mean, head.input, "head/input")
        self.operators.classifier(pooled, layer, OUTPUT)
