"""The constants in the file of an exported model against those that its network has.

Running a model shows a wrong constant only where an image makes it matter. Exporting is deterministic, so the
network is exported once more, and where both graphs have the same nodes, each constant must be the same.
"""

from __future__ import annotations

from functools import partial

import onnx
from onnx import numpy_helper

from qat_export.graphs.metadata import InputKind
from qat_export.graphs.native import emit_native
from qat_export.graphs.portable import emit_portable
from qat_export.integer.network import IntegerNetwork
from qat_export.verify.figures import TensorExactness


def compare_constants(
    model: onnx.ModelProto, network: IntegerNetwork, kind: InputKind, image_size: int
) -> list[TensorExactness]:
    """Each constant of ``model`` against a fresh export of ``network`` for images of that kind and size.

    Empty where the graphs differ in more than values: it comes from another version of the exporter, or was
    changed by another tool. A constant is named after the node that reads it, as "NODE, input 4".
    """
    for emitter in (emit_portable, partial(emit_portable, strict=True), emit_native):
        fresh = emitter(network, image_size, input_kind=kind)
        if _structure(fresh.graph) == _structure(model.graph):
            return [
                _compared(name, found, expected)
                for name, found, expected in zip(
                    _readers(fresh.graph), model.graph.initializer, fresh.graph.initializer, strict=True
                )
            ]
    return []


def _structure(graph: onnx.GraphProto) -> tuple[list[bytes], list[tuple[str, int, tuple[int, ...]]]]:
    """Nodes without their names and comments, and name, type and shape of each constant."""
    nodes = []
    for node in graph.node:
        bare = onnx.NodeProto()
        bare.CopyFrom(node)
        bare.name = bare.doc_string = ""
        nodes.append(bare.SerializeToString(deterministic=True))
    return nodes, [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer]


def _readers(graph: onnx.GraphProto) -> list[str]:
    """What to call each constant: its first reader and which input of that it is.

    Conversions have no names in a file; the first named node behind them stands for them.
    """
    readers: dict[str, tuple[onnx.NodeProto, int]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, (node, index))
    names = []
    for tensor in graph.initializer:
        node, index = readers[tensor.name]
        while not node.name and node.output[0] in readers:
            node, index = readers[node.output[0]]
        names.append(f"{node.name or node.output[0]}, input {index}")
    return names


def _compared(name: str, found: onnx.TensorProto, expected: onnx.TensorProto) -> TensorExactness:
    figures = TensorExactness(name, "none")
    figures.add(numpy_helper.to_array(found), numpy_helper.to_array(expected))
    return figures
