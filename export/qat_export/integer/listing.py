"""The listing of an integer network for a terminal: a line per layer with weights, and totals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qat.grid import Grid
from qat_export.integer.fields import named_arrays
from qat_export.integer.network import Affine, Float32, IntegerNetwork, SubBlock

_HEADINGS = ("layer", "kind", "weights", "bits", "stride", "bytes", "result", "multipliers")


@dataclass(frozen=True)
class Layer:
    """One layer with weights, as the listing shows it.

    Attributes:
        name: module name in the torch network.
        kind: what it is, in a word or two.
        shape: shape of its weights; of channel attention, the lengths of its three vectors.
        weights: number of weights.
        bits: bits of a weight: 1 if binary, else as many as the weight of the largest magnitude needs.
        stride: stride of a convolution over the image, else ``None``.
        size: bytes of the weights.
        result: type of the layer's result, after requantization.
        multipliers: smallest and largest multiplier of its requantization.
    """

    name: str
    kind: str
    shape: str
    weights: int
    bits: int
    stride: int | None
    size: int
    result: str
    multipliers: tuple[float, float]

    def cells(self) -> tuple[str, ...]:
        """The cells of the layer's line in the listing."""
        stride = "" if self.stride is None else str(self.stride)
        multipliers = " … ".join(f"{multiplier:.2e}" for multiplier in self.multipliers)
        numbers = str(self.bits), stride, f"{self.size:,}"
        return (self.name, self.kind, self.shape, *numbers, self.result, multipliers)


def layers(network: IntegerNetwork) -> Iterator[Layer]:
    """Stem, binary convolutions, channel attentions and classifier, in forward order."""
    yield _affine_layer("feature.0", "stem", network.stem.conv, network.stem_grid, network.stem.stride)
    for sub in network.sub_blocks():
        yield _binary_layer(sub)
        if sub.attention is not None:
            reduce, expand = sub.attention.reduce, sub.attention.expand
            hidden, channels = reduce.weight.shape
            yield Layer(
                f"{sub.name}.se",
                "attention",
                f"{channels} → {hidden} → {channels}",
                reduce.weight.size + expand.weight.size,
                max(_bits(reduce), _bits(expand)),
                None,
                reduce.weight.nbytes + expand.weight.nbytes,
                _type(sub.attention.attention),
                _range(np.concatenate((reduce.multiplier, expand.multiplier))),
            )
    yield _affine_layer("fc", "classifier", network.head.classifier, None, None)


def describe(network: IntegerNetwork) -> str:
    """A table with a line per layer, then totals, as text without a newline at the end.

    Columns: name, kind, shape of the weights, bits of a weight, stride, bytes of the weights, type of the
    result, range of the multipliers.
    """
    listed = list(layers(network))
    rows = [_HEADINGS, *(layer.cells() for layer in listed)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    # Numbers are aligned right, texts left.
    aligned = [
        "  ".join(
            cell.rjust(width) if heading in ("bits", "stride", "bytes") else cell.ljust(width)
            for cell, width, heading in zip(row, widths, _HEADINGS, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([network.architecture, "", *aligned, "", *_totals(network, listed)])


def _totals(network: IntegerNetwork, listed: list[Layer]) -> Iterator[str]:
    everything = sum(array.nbytes for _, array in named_arrays(network))
    table: list[tuple[str, str, int]] = []
    for label, binary in (("binary convolutions", True), ("layers of integer weights", False)):
        part = [layer for layer in listed if (layer.bits == 1) is binary]
        weights = sum(layer.weights for layer in part)
        table.append((f"{len(part)} {label}", f"{weights:,} weights", sum(layer.size for layer in part)))
    constants = everything - sum(size for _, _, size in table)
    table += [("thresholds, biases, multipliers, slopes, tables", "", constants), ("total", "", everything)]
    left, middle = max(len(row[0]) for row in table), max(len(row[1]) for row in table)
    for label, weights_text, size in table:
        yield f"{label:<{left}}  {weights_text:>{middle}}  {size:>{len(f'{everything:,}')},} bytes"


def _binary_layer(sub: SubBlock) -> Layer:
    conv = sub.conv
    return Layer(
        sub.name,
        f"{sub.kind} {conv.kernel_size}×{conv.kernel_size}",
        _shape(conv.shape),
        math.prod(conv.shape),
        1,
        conv.stride,
        conv.sign_bits.nbytes,
        _type(sub.y_grid),
        _range(conv.multiplier),
    )


def _affine_layer(name: str, kind: str, layer: Affine, result: Grid | None, stride: int | None) -> Layer:
    """A layer with integer weights; ``result`` is the grid of its result, ``None`` for float32 logits."""
    weight = layer.weight
    return Layer(
        name,
        kind,
        _shape(weight.shape),
        weight.size,
        _bits(layer),
        stride,
        weight.nbytes,
        "float32" if result is None else _type(result),
        _range(layer.multiplier),
    )


def _bits(layer: Affine) -> int:
    """Bits of the smallest symmetric grid that holds the layer's weights, at least 2."""
    return max(int(np.abs(layer.weight.astype(np.int16)).max()).bit_length() + 1, 2)


def _type(grid: Grid) -> str:
    return f"{'int' if grid.signed else 'uint'}{grid.bits}"


def _range(multiplier: Float32) -> tuple[float, float]:
    return float(multiplier.min()), float(multiplier.max())


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
