"""Compare the constants in the file of an exported model with those of its network.

Running a model shows a wrong constant only if some image makes a difference. But exporting is deterministic.
So the network is exported once more, and if both graphs have the same nodes, each constant must be the same.
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
    """Compare each constant of ``model`` with a fresh export of ``network``.

    Args:
        model: the exported model.
        network: the integer network that it was exported from.
        kind: type and layout of the images that the model takes.
        image_size: side of these images in pixels.

    Returns:
        A result for each constant, named after the node that reads it, such as "NODE, input 4". Empty if the
        graphs differ in more than the values of constants: then the model is from another version of the
        exporter, or was changed by another tool.
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
    """The nodes without their names and comments, and name, type and shape of each constant."""
    nodes = []
    for node in graph.node:
        bare = onnx.NodeProto()
        bare.CopyFrom(node)
        bare.name = bare.doc_string = ""
        nodes.append(bare.SerializeToString(deterministic=True))
    return nodes, [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer]


def _readers(graph: onnx.GraphProto) -> list[str]:
    """A name for each constant: the first node that reads it, and the number of the node's input.

    Nodes that convert values have no names in a file. Instead, the first node with a name after them is used.
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
