"""What the targets of an integer network share: image, order, head, and the finished model.

A target is a class below :class:`IntegerEmitter` that says what the stem, a sub-block and the mean over the
image are made of (:mod:`qat_export.graphs.portable`, :mod:`qat_export.graphs.native`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx

from qat import __version__
from qat.errors import QuantizationError
from qat.grid import Grid
from qat_export.graphs.builder import FLOAT, OPSET, UINT8, shorten_names, tensor_info
from qat_export.graphs.metadata import INPUT, OUTPUT, InputKind, model_metadata
from qat_export.graphs.operators import IntegerOperators
from qat_export.graphs.pixels import fold_normalization
from qat_export.graphs.walk import EmittedBlock, emit_blocks, side_behind
from qat_export.integer.network import Block, Head, IntegerNetwork, SubBlock


@dataclass(frozen=True)
class PlacedSubBlock:
    """A sub-block, the grid of the trunk tensor that it reads, and the grid of its result."""

    sub_block: SubBlock
    source: Grid
    output: Grid

    @property
    def name(self) -> str:
        """Module name in the network it came from."""
        return self.sub_block.name

    @property
    def stride(self) -> int:
        """Stride of its convolution."""
        return self.sub_block.conv.stride


class IntegerEmitter(ABC):
    """Appends an integer network to a graph, in forward order.

    Attributes:
        model_format: metadata property ``format``.
        note: for people who open the model, behind the summary of the network.
        weight_endings: endings of the names of weights, which keep their names in the file.
        domains: those of custom operators, with their versions.
        channel_axis: axis of the channels in a trunk tensor.
    """

    model_format: ClassVar[str]
    note: ClassVar[str]
    weight_endings: ClassVar[tuple[str, ...]]
    domains: ClassVar[Mapping[str, int]] = {}
    channel_axis: ClassVar[int] = 1

    def __init__(self, operators: IntegerOperators) -> None:
        """Append to the graph that ``operators`` append to."""
        self.operators, self.builder = operators, operators.builder

    @abstractmethod
    def stem(self, network: IntegerNetwork, image: str, output: str) -> str:
        """From the quantized image to the first trunk tensor."""

    @abstractmethod
    def sub_block(self, placed: PlacedSubBlock, x: str, side: int, output: str) -> str:
        """One sub-block; :class:`qat_export.integer.reference.Interpreter` says what it computes."""

    @abstractmethod
    def head_mean(self, head: Head, grid: Grid, x: str, side: int) -> str:
        """The head's PReLU and mean over the image, float32, not yet rounded; ``x`` is on ``grid``."""

    def concatenate(self, parts: Sequence[str], output: str) -> str:
        """Along the channels."""
        return self.builder.node("Concat", parts, output, axis=self.channel_axis)

    def image(self, network: IntegerNetwork, kind: InputKind) -> str:
        """The graph's input on the grid of the image."""
        grid, output = network.stem.image, "image/uint8"
        if kind == "float32 NCHW":
            return self.operators.image(grid, output)
        gain, offset = fold_normalization(network)
        return self.operators.raw_image(grid, gain, offset, output, channels_last=kind == "uint8 NHWC")

    def append(self, network: IntegerNetwork, image_size: int, kind: InputKind) -> None:
        """The whole network, from the graph's input to its output."""
        x = self.stem(network, self.image(network, kind), "feature.0/trunk")
        side = side_behind(image_size, network.stem.stride)
        x, side = emit_blocks(self, map(_placed, network.blocks), x, side)
        head = network.head
        mean = self.head_mean(head, network.blocks[-1].output_grid, x, side)
        pooled = self.operators.integer(mean, head.input, "head/input")
        self.operators.classifier(pooled, head.classifier, OUTPUT)

    def model(self, network: IntegerNetwork, image_size: int | None, kind: InputKind) -> onnx.ModelProto:
        """The ONNX model of ``network``.

        Args:
            network: the lowered network.
            image_size: side of the images in pixels; the size it was trained on by default.
            kind: type and layout of the images.

        Raises:
            QuantizationError: an image size below 1, or a normalization that can't be folded into raw pixels
                exactly.
        """
        size = network.image_size if image_size is None else image_size
        if size < 1:
            raise QuantizationError(f"an image size of {size}; allowed: 1 or more")
        self.append(network, size, kind)
        shape: tuple[int, ...] = (size, size, 3) if kind == "uint8 NHWC" else (3, size, size)
        model = self.builder.model(
            "bnext",
            [tensor_info(INPUT, FLOAT if kind == "float32 NCHW" else UINT8, ["batch", *shape])],
            [tensor_info(OUTPUT, FLOAT, ["batch", len(network.class_names)])],
            opset=OPSET,
            domains=self.domains,
            metadata=_metadata(self.model_format, network, size, kind),
            description=f"{network}\n{self.note}",
            producer_version=__version__,
        )
        named = {"image/uint8", *network.grids}
        shorten_names(model, lambda name: name in named or name.endswith(self.weight_endings))
        return model


def _placed(block: Block) -> EmittedBlock[PlacedSubBlock]:
    return EmittedBlock(
        block.name,
        PlacedSubBlock(block.spatial, block.input_grid, block.middle_grid),
        [PlacedSubBlock(sub, block.middle_grid, block.output_grid) for sub in block.pointwise],
    )


def _metadata(model_format: str, network: IntegerNetwork, size: int, kind: InputKind) -> dict[str, str]:
    """Metadata properties of a model of ``network``; the grids of its tensors are in ``grids``."""
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
        facts=network.metadata | {"input": kind, "grids": json.dumps(grids, sort_keys=True)},
    )
