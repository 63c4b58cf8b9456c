"""Find the weights in the graph of an exported model: as stored, and as the graph's nodes unpack them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from qat.errors import CheckpointError, first_line
from qat.inspection.facts import PLUS_MINUS_ONE, SIGN_BITS, InspectedLayer, Range
from qat_export.graphs.storage import ZERO

Array = NDArray[Any]
_SUB_BLOCK: Final = r"(feature\.\d+\.\w+)"
#: Patterns of the names of weights in integer models and in float models, by the role of the layer.
_INTEGER_NAMES: Final = {
    "stem": r"(feature\.0)/trunk\.weight",
    "binary": rf"{_SUB_BLOCK}/binary_weight\.bits",
    "attention": rf"{_SUB_BLOCK}/(?:hidden|logits)\.weight",
    "classifier": r"(fc)\.weight",
}
_FLOAT_NAMES: Final = {
    "stem": r"(feature\.0)\.conv1\.weight",
    "binary": rf"{_SUB_BLOCK}\.binary_conv\.effective_weight",
    "attention": rf"{_SUB_BLOCK}\.se\.se\.[13]\.weight",
    "classifier": r"(fc)\.weight",
}
#: By role, ending of the name of the tensor that has the layer's result; the classifier gives float32 logits.
_RESULTS: Final = {"stem": "/trunk", "binary": "/conv", "attention": "/attention"}
#: Index of the input that holds the multipliers, by operator.
_MULTIPLIERS: Final = {"QLinearConv": 4, "Mul": 1, "DequantizeLinear": 1, "BinaryConv": 4, "Stem": 3}
#: Largest number of nodes to follow from a weight to its multiplier. The longest way is Cast, Sub, Conv, Add,
#: Round, Mul.
_STEPS: Final = 8


class WeightGraph:
    """The initializers of a model by name, and which nodes make and read each tensor.

    Attributes:
        arrays: the initializers, in the order in which nodes first read them; those that no node reads last.
        operators: types of the nodes.
        weights: names of the layers' weights that :meth:`layers` has yielded.

    Raises:
        CheckpointError: an initializer is damaged.
    """

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        """Read ``model``; ``path`` names it in errors."""
        self.path = path
        arrays: dict[str, Array] = {}
        for tensor in model.graph.initializer:
            try:
                arrays[tensor.name] = numpy_helper.to_array(tensor)
            except Exception as error:  # NumPy raises several classes for a size that doesn't fit
                raise CheckpointError(f"{path}: {tensor.name}: damaged: {first_line(error)}") from error
        # In a valid graph nodes are in forward order, but another tool may have changed that of initializers.
        read = [name for node in model.graph.node for name in node.input if name in arrays]
        self.arrays = {name: arrays[name] for name in dict.fromkeys([*read, *arrays])}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.consumers[name].append(node)
        self.operators = {node.op_type for node in model.graph.node}
        self.weights: set[str] = set()

    def layers(self, as_float: bool, grids: Any) -> Iterator[InspectedLayer]:
        """Describe every layer with weights, in forward order.

        Args:
            as_float: whether it is a float model.
            grids: the metadata property ``grids``, parsed from JSON and not trusted.

        Raises:
            CheckpointError: a layer is missing, or has nodes that no export of this project has.
        """
        found: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name in self.arrays:
            for role, pattern in (_FLOAT_NAMES if as_float else _INTEGER_NAMES).items():
                if match := re.fullmatch(pattern, name):
                    found[role, match[1]].append(name)
        for role in ("stem", "binary", "classifier"):
            if not any(key[0] == role for key in found):
                raise CheckpointError(
                    f"{self.path}: says that it is a BNext, but has no initializer named like the weights of "
                    f"a {role} layer; found {', '.join(list(self.arrays)[:4])}, …"
                )
        for (role, name), initializers in found.items():
            self.weights.update(initializers)
            if len(initializers) != (2 if role == "attention" else 1):
                raise CheckpointError(f"{self.path}: {name}: half of the attention's weights are missing")
            result = _result(grids, name + _RESULTS[role]) if role in _RESULTS else "float32"
            if role == "binary":
                yield self._binary(name, initializers[0], result)
            else:
                yield self._rest(name, role, initializers, result)

    def _checked(self, name: str) -> Array:
        """The initializer ``name``, which must hold numbers."""
        array = self.arrays[name]
        if not array.size or not np.isfinite(array).all():
            problem = "holds values that are not finite" if array.size else "is empty"
            raise CheckpointError(f"{self.path}: {name}: damaged: {problem}")
        return array

    def _binary(self, name: str, initializer: str, result: str) -> InspectedLayer:
        array = self._checked(initializer)
        packed = initializer.endswith(".bits")
        used = self._unpacked(initializer, f"{name}/binary_weight") if packed else array
        # The native operator reads the packed bits: its graph has no tensor of unpacked weights.
        unpacked = f"{name}/binary_weight" if f"{name}/binary_weight" in self.producers else ""
        if used.ndim != 4 or not used.size:
            raise CheckpointError(f"{self.path}: {initializer}: shape {list(used.shape)}, expected 4 sides")
        kind = "scale" if self._has_prelu(name) else "bias"
        share = exact_share(used)
        return InspectedLayer(
            name,
            f"{kind} {used.shape[2]}×{used.shape[3]}",
            (used.shape,),
            stored=SIGN_BITS if packed else array.dtype.name,
            bits=1 if packed else 8 * array.itemsize,
            size=array.nbytes,
            values=value_range([used]),
            in_use=PLUS_MINUS_ONE if share == 1.0 else "float32",
            result=result,
            exact_stored=share,
            exact_in_use=share,
            multiplier=self._multiplier(unpacked or initializer) if packed else None,
        )

    def _has_prelu(self, name: str) -> bool:
        """Whether the residual of the sub-block ``name`` goes through a PReLU, as in the scale kind."""
        updates = [node for node in self.consumers.get(f"{name}/y", []) if node.op_type == "TrunkUpdate"]
        return f"{name}/prelu1" in self.producers or any(
            len(node.input) > 4 and node.input[4] for node in updates
        )

    def _rest(self, name: str, role: str, initializers: list[str], result: str) -> InspectedLayer:
        arrays = [self._checked(initializer) for initializer in initializers]
        integer = arrays[0].dtype.kind in "iu"
        multiplier = None
        if integer:
            multipliers = [self._multiplier(initializer) for initializer in initializers]
            multiplier = min(low for low, _ in multipliers), max(high for _, high in multipliers)
            if role == "classifier":
                arrays = [array.T for array in arrays]
        values = arrays
        if integer:
            values = [array.astype(np.int16) - (ZERO if array.dtype == np.uint8 else 0) for array in arrays]
        largest = max(int(np.abs(value).max(initial=0)) for value in values) if integer else 0
        return InspectedLayer(
            f"{name}.se" if role == "attention" else name,
            role,
            # With sides of 1, as in a checkpoint, where the layers of an attention are 1×1 convolutions.
            tuple(array.shape + (1, 1) * (role == "attention" and array.ndim == 2) for array in arrays),
            stored=arrays[0].dtype.name,
            bits=8 * arrays[0].itemsize,
            size=sum(array.nbytes for array in arrays),
            values=value_range(values),
            in_use=f"int{max(largest.bit_length() + 1, 2)}" if integer else "float32",
            result=result,
            multiplier=multiplier,
        )

    def _unpacked(self, bits: str, output: str) -> Array:
        """Weights that the graph unpacks from sign bits.

        The nodes look each byte up in a table, flatten the result, cut it to its length, and reshape it.
        """
        reader = next(iter(self.consumers.get(bits, [])), None)
        if reader is not None and reader.op_type == "BinaryConv":
            return self._operator_weight(bits, reader)
        problem = f"{self.path}: {bits}: is not unpacked to {output!r} as this version does it"
        node = self.producers.get(output)
        if node is None or node.op_type != "Reshape" or node.input[1] not in self.arrays:
            raise CheckpointError(problem)
        shape = [int(side) for side in self.arrays[node.input[1]]]
        for _ in range(_STEPS):
            node = self.producers.get(node.input[0])
            if node is None or node.op_type not in ("Reshape", "Slice", "Gather"):
                break
            if node.op_type == "Gather":
                cast = self.producers.get(node.input[1])
                table, packed = self.arrays.get(node.input[0]), self.arrays[bits]
                if cast is None or list(cast.input) != [bits] or table is None or table.shape != (256, 8):
                    break
                count = int(np.prod(shape))
                if packed.dtype != np.uint8 or packed.shape != (-(-count // 8),):
                    raise CheckpointError(
                        f"{self.path}: {bits}: damaged: {packed.dtype.name} {list(packed.shape)}, expected "
                        f"uint8 [{-(-count // 8)}] for weights {shape}"
                    )
                unpacked: Array = table[packed].reshape(-1)[:count].reshape(shape)
                return unpacked
        raise CheckpointError(problem)

    def _operator_weight(self, bits: str, reader: onnx.NodeProto) -> Array:
        """Weights (O, I, k, k) that the native operator unpacks from sign bits (O, k, k, ⌈I/8⌉)."""
        packed = self.arrays[bits]
        channels = self.arrays.get(reader.input[2], np.empty(0)).size
        shape = (*packed.shape[:3], -(-channels // 8))
        if packed.dtype != np.uint8 or packed.ndim != 4 or packed.shape != shape or not channels:
            raise CheckpointError(
                f"{self.path}: {bits}: damaged: {packed.dtype.name} {list(packed.shape)}, expected uint8 "
                f"{list(shape)} for {channels} channels"
            )
        positive = np.unpackbits(packed, axis=-1, count=channels, bitorder="little").astype(np.int8)
        return (2 * positive - 1).transpose(0, 3, 1, 2)

    def _multiplier(self, tensor: str) -> Range:
        """Smallest and largest multiplier of the layer whose weight is ``tensor``."""
        for _ in range(_STEPS):
            node = next(iter(self.consumers.get(tensor, [])), None)
            if node is None:
                break
            position = _MULTIPLIERS.get(node.op_type)
            if node.op_type == "ChannelAttention":
                position = list(node.input).index(tensor) + 2
            if position is not None and node.input[position] in self.arrays:
                return value_range([self._checked(node.input[position])])
            tensor = node.output[0]
        raise CheckpointError(f"{self.path}: {tensor}: no multiplier behind it, as every layer of ours has")


def _result(grids: Any, name: str) -> str:
    """Type of the tensor ``name``: that of its grid, or float32 if it has none."""
    grid = grids.get(name) if isinstance(grids, Mapping) else None
    if not isinstance(grid, Mapping):
        return "float32"
    return f"{'int' if grid.get('signed') else 'uint'}{grid.get('bits')}"


def exact_share(weights: Array) -> float:
    """Share of ``weights``, 0 to 1, that are exactly ±1."""
    return int(np.count_nonzero(np.abs(weights) == 1)) / weights.size


def value_range(arrays: list[Array]) -> Range:
    """Smallest and largest value in all ``arrays``."""
    return min(float(array.min()) for array in arrays), max(float(array.max()) for array in arrays)
