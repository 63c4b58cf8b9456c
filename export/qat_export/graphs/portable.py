"""The portable target: an ONNX graph of standard operators that computes an integer network.

This file has the order of operations; :mod:`qat_export.graphs.operators` writes each in ONNX operators.
"""

from __future__ import annotations

import numpy as np
import onnx

from qat.grid import Grid
from qat_export.graphs.builder import FLOAT, GraphBuilder
from qat_export.graphs.integer_emitter import IntegerEmitter, PlacedSubBlock
from qat_export.graphs.metadata import InputKind
from qat_export.graphs.operators import IntegerOperators
from qat_export.graphs.storage import TO_FIRST, TO_LAST, ZERO
from qat_export.graphs.strict_operators import StrictOperators
from qat_export.graphs.walk import side_behind
from qat_export.integer.network import GAIN, Attention, Head, IntegerNetwork, SubBlock


def emit_portable(
    network: IntegerNetwork,
    image_size: int | None = None,
    *,
    input_kind: InputKind = "float32 NCHW",
    strict: bool = False,
) -> onnx.ModelProto:
    """The ONNX model of ``network``: images (batch, 3, S, S), or (batch, S, S, 3) → float32 logits.

    Args:
        network: the integer network.
        image_size: side ``S`` in pixels; ``None`` means ``network.image_size``.
        input_kind: type and layout of the images.
        strict: whether to use only operators that all runtimes compute alike. The numbers are the same, but
            onnxruntime is slower.

    Raises:
        QuantizationError: the image size is below 1; the normalization can't be folded into raw pixels
            exactly; or, in the strict form, a sum is too large for float32.
    """
    operators = (StrictOperators if strict else IntegerOperators)(GraphBuilder())
    return PortableEmitter(operators).model(network, image_size, input_kind)


class PortableEmitter(IntegerEmitter):
    """The network in the operations of :class:`qat_export.graphs.operators.IntegerOperators`."""

    model_format = "bnext-qat portable 1"
    note = f"int8 tensors are uint8 with zero point {ZERO}; metadata 'grids' has the scales."
    weight_endings = ("/binary_weight", ".bits", ".weight")

    def stem(self, network: IntegerNetwork, image: str, output: str) -> str:
        """See the base class."""
        stem = network.stem
        return self.operators.affine_conv(
            image, stem.conv, stem.image, network.stem_grid, output, strides=stem.stride, pads=1
        )

    def sub_block(self, placed: PlacedSubBlock, x: str, side: int, output: str) -> str:
        """See the base class."""
        sub, source, stride = placed.sub_block, placed.source, placed.stride
        name, out_side = sub.name, side_behind(side, stride)
        q = self.operators.binary_conv(x, sub.conv, sub.y_grid, side, f"{name}/conv")
        y = self.operators.prelu(q, sub.slopes, sub.y_grid, out_side, f"{name}/y")
        residual = x
        if sub.residual_slopes is not None:
            residual = self.operators.prelu(x, sub.residual_slopes, source, side, f"{name}/prelu1")
        if stride == 2:
            even = self.operators.pad_to_even(residual, f"{name}/residual.even") if side % 2 else residual
            residual = self.operators.pool2x2(even, sub.conv.channels, f"{name}/residual")
        branch = self.branch(sub, x, y, residual, side)
        terms = (
            (branch, sub.branch_multiplier.value),
            (residual, sub.residual_multiplier.value),
        )
        return self.operators.elementwise("Add", *terms, placed.output, output)

    def branch(self, sub: SubBlock, x: str, y: str, residual: str, side: int) -> str:
        """Append the branch from ``y`` to BN2's result; returns ``y`` if the sub-block has no branch."""
        if sub.branch is None:
            return y
        name, branch = sub.name, sub.branch
        out_side = side_behind(side, sub.conv.stride)
        if sub.attention is not None:
            gain = self.attention(sub.attention, x, y, side, out_side, name)
        else:
            assert branch.gain is not None
            gain = self.operators.vector(branch.gain, out_side, f"{name}/gain")
        factors = (y, branch.first.value), (gain, 1.0)
        if branch.product is not None and branch.second is not None:
            product = self.operators.elementwise("Mul", *factors, branch.product, f"{name}/product")
            factors = (product, branch.second.value), (residual, 1.0)
        scaled = self.operators.elementwise("Mul", *factors, branch.grid, f"{name}/branch")
        offset = self.operators.vector(branch.offset, out_side, f"{name}/offset")
        terms = (scaled, 1.0), (offset, 1.0)
        return self.operators.elementwise("Add", *terms, branch.grid, f"{name}/normalized")

    def attention(self, attention: Attention, x: str, y: str, in_side: int, out_side: int, name: str) -> str:
        """Append channel attention; its result is the gain, which broadcasts against ``y``."""
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
        # The table is converted to float32 before the look-up, since it is multiplied by a float32 factor
        # next. Runtimes convert it once, when they load the model.
        stored = self.builder.constant(attention.table, f"{name}/sigmoid_table")
        table = self.builder.node("Cast", [stored], f"{name}/sigmoid_table.real", to=FLOAT)
        share = self.builder.node("Gather", [table, index], f"{name}/attention", axis=0)
        factor = self.builder.constant(attention.gain, f"{name}/gain.multiplier")
        gain = self.builder.node("Mul", [share, factor], f"{name}/gain.real")
        gain = self.operators.integer(gain, GAIN, f"{name}/gain")
        return self.operators.image_vector(gain, channels, out_side, f"{name}/gain.first")

    def head_mean(self, head: Head, grid: Grid, x: str, side: int) -> str:
        """See the base class."""
        channels = head.classifier.weight.shape[1]
        x = self.operators.prelu(x, head.slopes, grid, side, "head/prelu")
        multiplier = np.full(channels, head.mean, np.float32)
        return self.operators.mean(x, channels, side**2, multiplier, "head/mean")
