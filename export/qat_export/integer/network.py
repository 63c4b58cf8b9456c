"""The integer network: plain dataclasses of integers and float32 multipliers, without torch.

Every tensor between the image and the logits holds integers ``q`` that stand for ``q * scale``. The scales
are in :attr:`IntegerNetwork.grids` for information only. No operation uses them, since they are folded into
the multipliers. "In steps of" a tensor means in multiples of its scale. The interpreter in
:mod:`qat_export.integer.reference` defines every operation.

The parts of a sub-block have the names of the float network. BN1 and PReLU2 follow the binary convolution and
give ``y``. The branch leads from ``y`` through BN2 to the sum; PReLU1 changes the residual in the scale kind.
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

#: Smallest and largest threshold of a sign: at -128 every input gives +1, at 128 none does.
ALWAYS, NEVER = -128, 128
#: Grid of every gain vector. Its true scale is folded into the multipliers before and after the gain.
GAIN = Grid(1.0, 8, signed=True)


@dataclass(frozen=True, eq=False)
class Slopes:
    """Slopes of a PReLU on integers: ``q`` if ``q >= 0``, else ``round(q * integers / 2**shift)``.

    Attributes:
        integers: (C,) int8, one slope per channel.
        shift: at most 14; it may be negative.
    """

    integers: Int8
    shift: int


@dataclass(frozen=True, eq=False)
class Affine:
    """A layer with integer weights, and its requantization: ``round((weight · q + bias) * multiplier)``.

    Attributes:
        weight: (O, I) or (O, I, k, k) int8.
        bias: (O,) int32, in the unit of the accumulator ``weight · q``.
        multiplier: (O,) float32.
    """

    weight: Int8
    bias: Int32
    multiplier: Float32


@dataclass(frozen=True, eq=False)
class Stem:
    """The stem: a 3×3 convolution of the uint8 image with padding 1; its weights are (C, 3, 3, 3)."""

    conv: Affine
    stride: int
    image: Grid


@dataclass(frozen=True, eq=False)
class BinaryConv:
    """Threshold, binary convolution and requantization.

    The sign of an input ``q`` in channel ``c`` is +1 if ``q >= threshold[c]``, else -1. Padding is 0. The
    accumulator is the sum of the products of signs and weights, all ±1, times
    :data:`qat.quantize.dyadic.ACCUMULATOR_UNIT`, 64.

    Attributes:
        threshold: (C,) int16 in -128 … 128.
        sign_bits: weights (C, C, k, k) in C order, 8 to a byte, the first in the most significant bit; a bit
            of 1 is +1, of 0 is -1.
        kernel_size: k, 1 or 3; padding is ``kernel_size // 2``.
        bias: (C,) int32, in the unit of the accumulator, 1/64 of a product.
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
        """Number of input channels, which is that of output channels."""
        return len(self.threshold)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the weights."""
        return (self.channels, self.channels, self.kernel_size, self.kernel_size)

    def weight(self) -> Int8:
        """The unpacked weights: (C, C, k, k) int8, ±1."""
        bits = np.unpackbits(self.sign_bits, count=math.prod(self.shape)).astype(np.int8)
        return (2 * bits - 1).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Attention:
    """Channel attention: a factor per channel, from the means of the sub-block's input and of ``y``.

    The weighted sum of both means is the pooled vector. A 1×1 layer turns it into the hidden vector, another
    one that into logits, and a table the logits into the attention, their sigmoid.

    Attributes:
        input_mean, y_mean: (C,) float32, multipliers from the two means to steps of the pooled vector; they
            contain the mix scale.
        pooled, hidden, logits: grids of the three vectors; that of hidden is unsigned, the others are signed.
        reduce: 1×1 layer from pooled to hidden. Saturation to the unsigned grid acts as the ReLU.
        expand: 1×1 layer from hidden to the logits.
        table: (256,) uint8, the attention for the logit ``index - 128``.
        attention: grid of the table's values: unsigned, from 0 to 1.
        gain: (C,) float32, multiplier from the integers of the attention to those of the gain vector; it
            contains BN2's gain.
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
    """The branch from ``y`` to BN2's result: ``gain * y``, in the scale kind times the residual, plus offset.

    Attributes:
        gain: (C,) int8, BN2's gain; ``None`` with channel attention, which computes a gain for each image.
        first: multiplier of ``gain * y``.
        product: grid of ``gain * y`` in the scale kind, where it is rounded before it is multiplied with the
            residual; ``None`` in the bias kind.
        second: multiplier of product times residual; ``None`` in the bias kind.
        offset: (C,) int8, BN2's offset in steps of the branch.
        grid: grid of the branch, before and after the offset is added.
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
        name: module name in the torch network.
        kind: "scale" if the branch is also multiplied with the residual, "bias" if they are only added.
        y_grid: grid of the convolution's result, before and after PReLU2.
        slopes: slopes of PReLU2.
        residual_slopes: slopes of PReLU1; ``None`` in the bias kind.
        attention: channel attention; ``None`` without information recoupling.
        branch: branch from ``y`` to BN2's result; ``None`` if ``y`` itself is added to the residual.
        branch_multiplier, residual_multiplier: multipliers of both terms of the sum, to steps of the output;
            of equal shifts.
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
        """Grid of every tensor inside, by name; ``source`` is the grid of the input."""
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
        mean: float32 multiplier from the mean to steps of the classifier's input.
        input: grid of the classifier's input.
        classifier: layer with weight (classes, C), whose multiplier gives logits.
    """

    slopes: Slopes
    mean: np.float32
    input: Grid
    classifier: Affine


@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """A whole network.

    Attributes:
        architecture: description of the network, one line of text.
        image_size: side of the images in pixels that exports take by default; the network itself fits any.
        mean, std: normalization of the float image, per channel.
        class_names: names of the classes in the order of the logits.
        metadata: further texts by name, which exports copy into their metadata.
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
        """A summary of a few lines: layers, weights and bits."""
        binary = [math.prod(sub.conv.shape) for sub in self.sub_blocks()]
        other = sum(affine.weight.size for affine in self.affines())
        return (
            f"{self.architecture}\n"
            f"  {len(binary)} binary convolutions, {sum(binary):,} weights at 1 bit\n"
            f"  {other:,} integer weights in stem, channel attention and classifier\n"
            f"  {len(self.grids)} integer tensors between image and logits"
        )

    def affines(self) -> Iterator[Affine]:
        """All layers with integer weights of more than one bit, in forward order."""
        yield self.stem.conv
        for sub in self.sub_blocks():
            if sub.attention is not None:
                yield from (sub.attention.reduce, sub.attention.expand)
        yield self.head.classifier
