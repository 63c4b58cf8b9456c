"""The order of a network's sub-blocks and the names of the tensors between them, the same in every target.

A block is a 3×3 sub-block followed by one 1×1 sub-block, or by two that both read the output of the 3×3 one
and whose outputs are concatenated. The trunk is the tensor that passes from one sub-block to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class NamedSubBlock(Protocol):
    """The attributes of a sub-block that :func:`emit_blocks` uses; a target's own class may have more."""

    @property
    def name(self) -> str:
        """Module name in the torch network."""

    @property
    def stride(self) -> int:
        """Stride of its convolution: 1 or 2."""


Sub = TypeVar("Sub", bound=NamedSubBlock)
AnySub = TypeVar("AnySub", bound=NamedSubBlock, contravariant=True)


@dataclass(frozen=True)
class EmittedBlock(Generic[Sub]):
    """A block: its module name, its 3×3 sub-block, and the 1×1 sub-blocks after it."""

    name: str
    spatial: Sub
    pointwise: Sequence[Sub]


class SubBlockEmitter(Protocol[AnySub]):
    """A target, which appends the nodes of one sub-block to its graph. Tensors are passed by name."""

    def sub_block(self, sub: AnySub, x: str, side: int, output: str, /) -> str:
        """Append a sub-block that reads ``x``, ``side`` pixels square; returns ``output``, its result."""

    def concatenate(self, parts: Sequence[str], output: str, /) -> str:
        """Append the concatenation of ``parts`` along the channels; returns ``output``."""


def emit_blocks(
    emitter: SubBlockEmitter[Sub], blocks: Iterable[EmittedBlock[Sub]], x: str, side: int
) -> tuple[str, int]:
    """Append all blocks to a graph.

    Args:
        emitter: the target.
        blocks: in forward order.
        x: name of the stem's output.
        side: side of the stem's output in pixels.

    Returns:
        Name of the last block's output, and its side in pixels.
    """
    for block in blocks:
        x = emitter.sub_block(block.spatial, x, side, f"{block.name}/trunk_mid")
        side = side_behind(side, block.spatial.stride)
        output = f"{block.name}/trunk_out"
        if len(block.pointwise) == 1:
            x = emitter.sub_block(block.pointwise[0], x, side, output)
        else:
            parts = [emitter.sub_block(sub, x, side, f"{sub.name}/out") for sub in block.pointwise]
            x = emitter.concatenate(parts, output)
    return x, side


def side_behind(side: int, stride: int) -> int:
    """Side in pixels of the result of a convolution with ``stride`` on an image of ``side`` pixels."""
    return -(-side // stride)
