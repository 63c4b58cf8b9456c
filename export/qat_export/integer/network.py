"""The lowered description of a network: plain dataclasses of integers and float32 multipliers, no torch.

Every tensor between the image and the logits holds integers ``q`` that stand for ``q * scale``. The scales
are in :attr:`IntegerNetwork.grids` for readers, and appear in no arithmetic: they have been folded into
multipliers. "In steps of" a tensor means in multiples of its scale. What the numbers mean, operation by
operation, is defined by the interpreter in :mod:`qat_export.integer.reference`.

A sub-block's parts have the names of the float network: BN1 and PReLU2 follow the binary convolution and give
``y``; PReLU1 stands before the residual, BN2 at the end of the branch from ``y`` to the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qat.grid import Grid
from qat.quantize.dyadic import Dyadic

Int8 = NDArray[np.int8]
UInt8 = NDArray[np.uint8]
Int16 = NDArray[np.int16]
Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

#: Thresholds lie in -128 … 128: at -128 every input is +1, at 128 none is.
ALWAYS, NEVER = -128, 128
#: Grid of a gain vector. What its integers stand for is folded into the multipliers before and after it.
GAIN = Grid(1.0, 8, signed=True)


@dataclass(frozen=True, eq=False)
class Slopes:
    """PReLU on integers: ``q`` where ``q >= 0``, else ``round(q * integers / 2**shift)``.

    Attributes:
        integers: (C,) int8.
        shift: at most 14; may be negative.
    """

    integers: Int8
    shift: int


@dataclass(frozen=True, eq=False)
class Affine:
    """Integer weights with requantization: ``round((weight · q + bias) * multiplier)``.

    Attributes:
        weight: (O, I) or (O, I, k, k) int8.
        bias: (O,) int32, in units of the accumulator.
        multiplier: (O,) float32.
    """

    weight: Int8
    bias: Int32
    multiplier: Float32


@dataclass(frozen=True, eq=False)
class Stem:
    """3×3 convolution of the uint8 image with padding 1; weights (C, 3, 3, 3)."""

    conv: Affine
    stride: int
    image: Grid


@dataclass(frozen=True, eq=False)
class BinaryConv:
    """Threshold, binary convolution, requantization.

    The input bit of channel ``c`` is +1 where ``q >= threshold[c]``, else -1; padding adds nothing.
    The accumulator is the sum of products of ±1 times :data:`qat.quantize.dyadic.ACCUMULATOR_UNIT`.

    Attributes:
        threshold: (C,) int16 in -128 … 128.
        sign_bits: weights (C, C, k, k) in C order, 8 to a byte, most significant bit first; 1 is +1.
        kernel_size: 1 or 3; padding is ``kernel_size // 2``.
        bias: (C,) int32, in 1/64 of a product.
        multiplier: (C,) float32, positive.
    """

    threshold: Int16
    sign_bits: UInt8
    kernel_size: int
    stride: int
    bias: Int32
    multiplier: Float32

    @property
    def channels(self) -> int:
        """Input and output channels."""
        return len(self.threshold)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the weights."""
        return (self.channels, self.channels, self.kernel_size, self.kernel_size)

    def weight(self) -> Int8:
        """The weights unpacked: (C, C, k, k) int8 of ±1."""
        bits = np.unpackbits(self.sign_bits, count=math.prod(self.shape)).astype(np.int8)
        return (2 * bits - 1).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Attention:
    """Channel attention: a factor per channel, from the means of the sub-block's input and of ``y``.

    The weighted sum of both means is the pooled vector; two 1×1 layers make the hidden vector and the logits
    of it, and a table their sigmoid.

    Attributes:
        input_mean, y_mean: (C,) float32 multipliers that turn both means into steps of the pooled vector,
            the mix scale included.
        pooled, hidden, logits: grids of the three vectors; hidden is unsigned, the others are signed.
        reduce: 1×1 layer to the hidden vector; its unsigned grid cuts at 0, as ReLU does.
        expand: 1×1 layer to the logits.
        table: (256,) uint8, the sigmoid of logit ``index - 128``.
        attention: grid of the table's values (unsigned, 0 to 1).
        gain: (C,) float32 multiplier from integers of the attention to integers of the gain vector, which
            BN2's gain is part of.
    """

    input_mean: Float32
    y_mean: Float32
    pooled: Grid
    reduce: Affine
    hidden: Grid
    expand: Affine
    logits: Grid
    table: UInt8
    attention: Grid
    gain: Float32


@dataclass(frozen=True, eq=False)
class Branch:
    """From ``y`` to BN2's result: ``gain * y``, times the residual in the scale kind, plus BN2's offset.

    Attributes:
        gain: BN2's gain, int8 (C,); ``None`` where channel attention makes the gain, for each image anew.
        first: multiplier of ``gain * y``.
        product: grid of ``gain * y`` before it meets the residual (scale kind), else ``None``.
        second: multiplier of product times residual (scale kind), else ``None``.
        offset: (C,) int8, BN2's offset in steps of the branch.
        grid: grid of the branch, before and after the offset.
    """

    gain: Int8 | None
    first: Dyadic
    product: Grid | None
    second: Dyadic | None
    offset: Int8
    grid: Grid


@dataclass(frozen=True, eq=False)
class SubBlock:
    """One binary convolution with everything around it.

    Attributes:
        name: module name in the network it came from.
        kind: "scale" where the residual is a factor of the branch too, "bias" where it is only added.
        y_grid: grid of the convolution's result, before and after PReLU2.
        slopes: PReLU2.
        residual_slopes: PReLU1 (scale kind), else ``None``.
        attention: ``None`` without information recoupling.
        branch: ``None`` where ``y`` is added to the residual as it is.
        branch_multiplier, residual_multiplier: turn both terms of the sum into steps of the output; their
            shifts are equal.
    """

    name: str
    kind: Literal["scale", "bias"]
    conv: BinaryConv
    y_grid: Grid
    slopes: Slopes
    residual_slopes: Slopes | None
    attention: Attention | None
    branch: Branch | None
    branch_multiplier: Dyadic
    residual_multiplier: Dyadic

    def grids(self, source: Grid) -> dict[str, Grid]:
        """Grid of every tensor inside, by name; ``source`` is that of the input."""
        grids = {f"{self.name}/conv": self.y_grid, f"{self.name}/y": self.y_grid}
        if self.residual_slopes is not None:
            grids[f"{self.name}/prelu1"] = source
        if self.conv.stride == 2:
            grids[f"{self.name}/residual"] = source
        if self.attention is not None:
            for leaf in ("pooled", "hidden", "logits", "attention"):
                grids[f"{self.name}/{leaf}"] = getattr(self.attention, leaf)
        if self.branch is not None:
            if self.branch.product is not None:
                grids[f"{self.name}/product"] = self.branch.product
            grids[f"{self.name}/branch"] = grids[f"{self.name}/normalized"] = self.branch.grid
        return grids


@dataclass(frozen=True, eq=False)
class Block:
    """A 3×3 sub-block, then one 1×1 sub-block or two whose outputs are concatenated."""

    name: str
    spatial: SubBlock
    pointwise: tuple[SubBlock, ...]
    middle_grid: Grid
    output_grid: Grid
    input_grid: Grid


@dataclass(frozen=True, eq=False)
class Head:
    """PReLU (``slopes``), mean over the image, classifier.

    Attributes:
        mean: float32 multiplier that turns the mean into steps of the classifier's input.
        input: grid of the classifier's input.
        classifier: weight (classes, C); multiplier in logits.
    """

    slopes: Slopes
    mean: np.float32
    input: Grid
    classifier: Affine


@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """A whole network.

    Attributes:
        architecture: one line of text.
        image_size: side of the images an export takes; the description itself fits any size.
        mean, std: normalization of the float image, per channel.
        class_names: in the order of the logits.
        metadata: further texts by name, which every export carries along.
    """

    architecture: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_names: tuple[str, ...]
    stem: Stem
    stem_grid: Grid
    blocks: tuple[Block, ...]
    head: Head
    metadata: dict[str, str]

    def sub_blocks(self) -> Iterator[SubBlock]:
        """All sub-blocks in forward order."""
        for block in self.blocks:
            yield from (block.spatial, *block.pointwise)

    @property
    def grids(self) -> dict[str, Grid]:
        """Grid of every named integer tensor (names as in the interpreter and in exported graphs)."""
        grids = {"image": self.stem.image, "feature.0/trunk": self.stem_grid}
        for block in self.blocks:
            grids |= block.spatial.grids(block.input_grid)
            for sub in block.pointwise:
                grids |= sub.grids(block.middle_grid)
            grids[f"{block.name}/trunk_mid"] = block.middle_grid
            grids[f"{block.name}/trunk_out"] = block.output_grid
        return grids | {"head/prelu": self.blocks[-1].output_grid, "head/input": self.head.input}

    def __str__(self) -> str:
        """A few lines: layers, weights, bits."""
        binary = [math.prod(sub.conv.shape) for sub in self.sub_blocks()]
        other = sum(affine.weight.size for affine in self.affines())
        return (
            f"{self.architecture}\n"
            f"  {len(binary)} binary convolutions, {sum(binary):,} weights at 1 bit\n"
            f"  {other:,} integer weights in stem, channel attention and classifier\n"
            f"  {len(self.grids)} integer tensors between image and logits"
        )

    def affines(self) -> Iterator[Affine]:
        """Layers with integer weights of more than one bit."""
        yield self.stem.conv
        for sub in self.sub_blocks():
            if sub.attention is not None:
                yield from (sub.attention.reduce, sub.attention.expand)
        yield self.head.classifier
