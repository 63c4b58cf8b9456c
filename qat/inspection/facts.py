"""What an inspection finds in a file: facts about each layer with weights, and totals.

Checkpoints (:mod:`qat.inspection.checkpoint`) and exports (:mod:`qat_export.inspection.exports`)
are described alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, prod
from typing import Any, Final

Range = tuple[float, float]
#: How a weight is stored that is one bit, as :attr:`InspectedLayer.stored` has it.
SIGN_BITS: Final = "sign bits"
#: What the weights of a binary layer are in use, as :attr:`InspectedLayer.in_use` has it.
PLUS_MINUS_ONE: Final = "±1"


@dataclass(frozen=True)
class InspectedLayer:
    """One layer with weights: the stem, a binary convolution, a channel attention (both layers) or the
    classifier.

    Attributes:
        name: module name: ``feature.0``, a sub-block, a sub-block's ``.se``, or ``fc``.
        kind: ``stem``, ``bias 3×3`` and the like for a binary convolution, ``attention`` or ``classifier``.
        shapes: of the weights: one, or two of an attention.
        stored: type in the file: ``sign bits``, ``float32``, ``float16``, ``uint8``, …
        bits: that the file spends on a weight.
        size: bytes that the weights take in the file.
        values: smallest and largest weight as stored: latent weights of a checkpoint, integers of an export,
            ±1 of sign bits.
        exact_stored: share, 0 to 1, of the stored weights that are exactly ±1; binary layers only.
        temperature: of a binary convolution in a checkpoint.
        exact_in_use: share of the weights in use that are exactly ±1; binary layers only.
        in_use: what the weights in use are: ``±1``, ``float32``, or ``int8`` and the like where quantized.
        result: type of what the layer gives: ``int8`` and the like where quantized, else ``float32``.
        scale: least and largest of the weights' scales per channel; quantized layers of checkpoints.
        multiplier: least and largest multiplier of an accumulator, into which lowering folded the scales of
            weights, input and result; integer exports.
    """

    name: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    stored: str
    bits: int
    size: int
    values: Range
    in_use: str
    result: str
    exact_stored: float | None = None
    temperature: float | None = None
    exact_in_use: float | None = None
    scale: Range | None = None
    multiplier: Range | None = None

    @property
    def weights(self) -> int:
        """How many."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def is_binary_convolution(self) -> bool:
        """Whether the network means these weights to be ±1."""
        return self.exact_in_use is not None

    @property
    def binary(self) -> bool:
        """Whether every weight in use is exactly ±1."""
        return self.exact_in_use == 1.0

    def to_dict(self) -> dict[str, Any]:
        """All attributes, the count of weights and ``binary``, for JSON."""
        return asdict(self) | {"weights": self.weights, "binary": self.binary}


@dataclass(frozen=True)
class Total:
    """Values of one sort in a file: how many, bytes in the file, bytes if all were float32."""

    count: int
    size: int

    @property
    def float32_size(self) -> int:
        """Bytes as float32."""
        return 4 * self.count

    def to_dict(self) -> dict[str, int]:
        """All three, for JSON."""
        return {"count": self.count, "bytes": self.size, "float32_bytes": self.float32_size}


@dataclass(frozen=True)
class Inspection:
    """A file.

    Attributes:
        path: of the file.
        format: what it is, in words.
        file_size: bytes.
        architecture: one line of text.
        widths: channels behind the stem, then behind each block.
        num_classes: rows of the classifier.
        layers: in forward order.
        other: tensors beside the layers' weights: normalizations, biases, slopes, thresholds, quantizers.
        facts: what else the file tells, see :func:`facts_of`.
        exported: whether it is a model or integer network that was exported, not a checkpoint.
        published: whether it is in a format of BNext's authors.
    """

    path: str
    format: str
    file_size: int
    architecture: str
    widths: tuple[int, ...]
    num_classes: int
    layers: tuple[InspectedLayer, ...]
    other: Total
    facts: Mapping[str, Any]
    exported: bool
    published: bool = False

    @property
    def size(self) -> str:
        """Name of the published size, else ``custom``."""
        return self.architecture.removeprefix("BNext ").split(",")[0].split(" ")[0]

    @property
    def binary_layers(self) -> list[InspectedLayer]:
        """The binary convolutions."""
        return [layer for layer in self.layers if layer.is_binary_convolution]

    @property
    def rest_layers(self) -> list[InspectedLayer]:
        """Stem, attentions and classifier."""
        return [layer for layer in self.layers if not layer.is_binary_convolution]

    def totals(self) -> dict[str, Total]:
        """By sort: ``binary`` weights, weights of the ``rest``, and ``other`` tensors."""
        return {
            "binary": _total(self.binary_layers),
            "rest": _total(self.rest_layers),
            "other": self.other,
        }

    @property
    def container_size(self) -> int:
        """Bytes of the file that belong to none of these: names, metadata, a graph, an optimizer's state."""
        return max(self.file_size - sum(total.size for total in self.totals().values()), 0)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the verdict, for JSON."""
        layers = self.binary_layers
        return {
            "file": self.path,
            "format": self.format,
            "file_bytes": self.file_size,
            "architecture": self.architecture,
            "size": self.size,
            "widths": list(self.widths),
            "num_classes": self.num_classes,
            "facts": dict(self.facts),
            "binary_layers": sum(layer.binary for layer in layers),
            "binary_convolutions": len(layers),
            "totals": {name: total.to_dict() for name, total in self.totals().items()}
            | {"container_bytes": self.container_size},
            "layers": [layer.to_dict() for layer in self.layers],
        }


def facts_of(metadata: Mapping[str, str], recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the free metadata of a file tell about the network, as far as they are there and can be read.

    Args:
        metadata: texts, some of them JSON, as checkpoints and exports carry them.
        recipe: of the run, where it isn't JSON under ``recipe``.

    Returns:
        Of these what is known: ``task``, ``dataset``, ``image_size``, ``mean``, ``std``, ``class_names``,
        ``accuracy`` (``top1``, ``top5``, ``n``, ``loss``), ``epoch``, ``versions``, and texts under the names
        that they have in the metadata.
    """
    read = {key: parsed(text) for key, text in metadata.items()}
    if recipe is None:
        recipe = read["recipe"] if isinstance(read.get("recipe"), dict) else {}
    data = recipe.get("data")
    data = data if isinstance(data, dict) else {}
    normalization = read.get("normalization")
    known: dict[str, Any] = {
        "task": recipe.get("task"),
        "dataset": data.get("dataset"),
        "image_size": data.get("image_size"),
        "mean": data.get("mean"),
        "std": data.get("std"),
    }
    known |= normalization if isinstance(normalization, dict) else {}
    left_out = {"recipe", "normalization", "grids", "format", "architecture"}
    known |= {key: value for key, value in read.items() if key not in left_out}
    return {key: value for key, value in known.items() if value is not None}


def parsed(text: str) -> Any:
    """A metadata text: what it is as JSON, else itself. (NaN and the like are JSON to Python alone.)"""

    def number(digits: str) -> float | str:
        value = float(digits)
        return value if isfinite(value) else digits  # 1e999 would become Infinity

    try:
        return json.loads(text, parse_constant=str, parse_float=number)
    except (ValueError, RecursionError):
        return text


def _total(layers: Iterable[InspectedLayer]) -> Total:
    layers = list(layers)
    return Total(sum(layer.weights for layer in layers), sum(layer.size for layer in layers))
