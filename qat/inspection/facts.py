"""The dataclasses that describe a file: facts about each layer with weights, and totals.

They are the same for checkpoints (:mod:`qat.inspection.checkpoint`) and for exported files
(:mod:`qat_export.inspection.exports`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, prod
from typing import Any, Final

Range = tuple[float, float]
#: Value of :attr:`InspectedLayer.stored` for weights that are stored at one bit each.
SIGN_BITS: Final = "sign bits"
#: Value of :attr:`InspectedLayer.in_use` for binary weights.
PLUS_MINUS_ONE: Final = "±1"


@dataclass(frozen=True)
class InspectedLayer:
    """One layer with weights: the stem, a binary convolution, a channel attention or the classifier.

    The weights *stored* are those in the file, such as latent weights. The weights *in use* are those that
    the network computes with, such as ±1.

    Attributes:
        name: module name: ``feature.0``, a sub-block, a sub-block's ``.se`` (both layers of an attention
            together), or ``fc``.
        kind: ``stem``, ``attention``, ``classifier``, or of a binary convolution its kind and size, such as
            ``bias 3×3``.
        shapes: shape of the weights; an attention has two.
        stored: type in the file, such as ``sign bits``, ``float32``, ``float16`` or ``uint8``.
        bits: bits in the file for each weight.
        size: bytes of the weights in the file.
        values: smallest and largest stored weight: of latent weights in a checkpoint, of integers in an
            export; -1 and 1 for sign bits.
        exact_stored: share of the stored weights, 0 to 1, that are exactly ±1; binary convolutions only.
        temperature: T of a binary convolution in a checkpoint, which uses ``clamp(w / T, -1, 1)``.
        exact_in_use: share of the weights in use, 0 to 1, that are exactly ±1; binary convolutions only.
        in_use: type of the weights in use: ``±1``, ``float32``, or such as ``int8`` if quantized.
        result: type of the layer's result: such as ``int8`` if quantized, else ``float32``.
        scale: smallest and largest scale of the weights' channels; quantized layers of checkpoints only.
        multiplier: smallest and largest multiplier of the accumulators, in which the scales of weights, input
            and result are folded together; integer exports only.
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
        """Number of weights."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def is_binary_convolution(self) -> bool:
        """Whether the layer is a binary convolution, even if its weights are not ±1 yet."""
        return self.exact_in_use is not None

    @property
    def binary(self) -> bool:
        """Whether every weight in use is exactly ±1."""
        return self.exact_in_use == 1.0

    def to_dict(self) -> dict[str, Any]:
        """All attributes, the number of weights and ``binary``, for JSON."""
        return asdict(self) | {"weights": self.weights, "binary": self.binary}


@dataclass(frozen=True)
class Total:
    """Values of one sort in a file: their number, and the bytes that they take in the file."""

    count: int
    size: int

    @property
    def float32_size(self) -> int:
        """Bytes that the values would take as float32."""
        return 4 * self.count

    def to_dict(self) -> dict[str, int]:
        """The number and both sizes, for JSON."""
        return {"count": self.count, "bytes": self.size, "float32_bytes": self.float32_size}


@dataclass(frozen=True)
class Inspection:
    """The description of a file.

    Attributes:
        path: path of the file.
        format: description of its format.
        file_size: size in bytes.
        architecture: description of the network, one line of text.
        widths: number of channels after the stem, then after each block.
        num_classes: number of classes.
        layers: layers with weights, in forward order.
        other: all tensors but the layers' weights: normalizations, biases, slopes, thresholds, quantizers.
        facts: what the metadata say about the network, see :func:`facts_of`.
        exported: whether it is an exported model or integer network; else it is a checkpoint.
        published: whether its format is one of BNext's authors.
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
        """Totals by sort: ``binary`` weights, weights of the ``rest`` of the layers, ``other`` tensors."""
        return {
            "binary": _total(self.binary_layers),
            "rest": _total(self.rest_layers),
            "other": self.other,
        }

    @property
    def container_size(self) -> int:
        """Bytes of the file that no total counts: names, metadata, a graph, an optimizer's state."""
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
    """Collect what the metadata of a file say about the network. What is absent or damaged is left out.

    Args:
        metadata: texts, some of them JSON, as checkpoints and exports carry them.
        recipe: recipe of the run; ``None`` takes it from the JSON text ``recipe`` in ``metadata``.

    Returns:
        Those that are known of ``task``, ``dataset``, ``image_size``, ``mean``, ``std``, ``class_names``,
        ``accuracy`` (``top1``, ``top5``, ``n``, ``loss``), ``epoch`` and ``versions``, and all other metadata
        under their own names.
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
    """A metadata text parsed as JSON, or the text itself if it is not JSON.

    NaN and infinities stay texts: Python's parser accepts them, but JSON has no such numbers.
    """

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
