"""What the targets of an integer network share: image, order of blocks, head, and the finished model.

A target is a subclass of :class:`IntegerEmitter` that emits the stem, a sub-block and the head's mean with
its own operators (:mod:`qat_export.graphs.portable`, :mod:`qat_export.graphs.native`).
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
    """A sub-block, with the grids of the trunk tensors that it reads and writes."""

    sub_block: SubBlock
    source: Grid
    output: Grid

    @property
    def name(self) -> str:
        """Module name in the torch network."""
        return self.sub_block.name

    @property
    def stride(self) -> int:
        """Stride of its convolution."""
        return self.sub_block.conv.stride


class IntegerEmitter(ABC):
    """Appends an integer network to a graph, in forward order.

    Attributes:
        model_format: value of the metadata property ``format``.
        note: text for people who open the model, after the summary of the network.
        weight_endings: endings of the names of tensors that keep their names in the file, since they are
            weights.
        domains: domains of custom operators, with their versions.
        channel_axis: axis of the channels in a trunk tensor.
    """

    model_format: ClassVar[str]
    note: ClassVar[str]
    weight_endings: ClassVar[tuple[str, ...]]
    domains: ClassVar[Mapping[str, int]] = {}
    channel_axis: ClassVar[int] = 1

    def __init__(self, operators: IntegerOperators) -> None:
        """Make an emitter that appends to the graph of ``operators``."""
        self.operators, self.builder = operators, operators.builder

    @abstractmethod
    def stem(self, network: IntegerNetwork, image: str, output: str) -> str:
        """Append the stem, from the quantized image to the first trunk tensor."""

    @abstractmethod
    def sub_block(self, placed: PlacedSubBlock, x: str, side: int, output: str) -> str:
        """Append one sub-block, as :class:`qat_export.integer.reference.Interpreter` defines it."""

    @abstractmethod
    def head_mean(self, head: Head, grid: Grid, x: str, side: int) -> str:
        """Append the head's PReLU and mean over the image; the result is float32, not yet rounded.

        ``x`` lies on ``grid``; ``side`` is the side of its image in pixels.
        """

    def concatenate(self, parts: Sequence[str], output: str) -> str:
        """Append the concatenation of ``parts`` along the channels."""
        return self.builder.node("Concat", parts, output, axis=self.channel_axis)

    def image(self, network: IntegerNetwork, kind: InputKind) -> str:
        """Append the operations that put the graph's input on the grid of the image."""
        grid, output = network.stem.image, "image/uint8"
        if kind == "float32 NCHW":
            return self.operators.image(grid, output)
        gain, offset = fold_normalization(network)
        return self.operators.raw_image(grid, gain, offset, output, channels_last=kind == "uint8 NHWC")

    def append(self, network: IntegerNetwork, image_size: int, kind: InputKind) -> None:
        """Append the whole network, from the graph's input to its output."""
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
            network: the integer network.
            image_size: side of the images in pixels; ``None`` means ``network.image_size``.
            kind: type and layout of the images.

        Raises:
            QuantizationError: the image size is below 1, or the normalization can't be folded into raw pixels
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
    """Metadata properties of a model of ``network``; one of them, ``grids``, has the grids of its tensors."""
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
