"""A small builder of ONNX graphs: named nodes, shared initializers, reproducible bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
#: Version of the standard operators in every model: the first that can quantize along an axis.
OPSET: Final = 13
#: Size in bytes above which shape inference and checker are spared a weight.
_LARGE: Final = 2**16
#: Operators that convert, move or look up values. Runtimes fuse their nodes away, so these need no name in a
#: file.
_UNNAMED: Final = frozenset(
    (
        "Cast",
        "DequantizeLinear",
        "Expand",
        "Gather",
        "QuantizeLinear",
        "Reshape",
        "Slice",
        "Tile",
        "Transpose",
    )
)


class GraphBuilder:
    """Collects nodes and initializers; equal initializers are stored once, and unused ones not at all.

    A node is named after its first output, so that a viewer shows the network's own names.
    """

    def __init__(self) -> None:
        """Start an empty graph."""
        self.nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def constant(self, value: Array | np.generic, name: str | None = None) -> str:
        """Name of an initializer that holds ``value``; without ``name``, equal values share one."""
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        key = (array.dtype.str, array.shape, array.tobytes())
        if name is None:
            if key in self._shared:
                return self._shared[key]
            text = str(array.item()) if array.ndim == 0 else f"array_{len(self._shared)}"
            name = f"constant/{array.dtype.name}_{text}"
            self._shared[key] = name
        if name in self._initializers:
            raise ValueError(f"initializer {name!r} exists already")
        self._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append one node with one output and return the output's name."""
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def custom(
        self, domain: str, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
    ) -> str:
        """Append one node of another domain and return its first output.

        An empty name among ``inputs`` leaves out an optional input.
        """
        name = outputs[0]
        node = helper.make_node(operator, list(inputs), list(outputs), name, domain=domain, **attributes)
        self.nodes.append(node)
        return name

    def model(
        self,
        name: str,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        *,
        opset: int,
        metadata: Mapping[str, str],
        description: str,
        producer_version: str,
        domains: Mapping[str, int] | None = None,
    ) -> onnx.ModelProto:
        """The finished model, with inferred shapes, checked by ``onnx.checker``; the bytes are reproducible.

        Args:
            name: name of the graph.
            inputs, outputs: inputs and outputs of the graph.
            opset: version of the standard operators.
            metadata: metadata properties.
            description: text on the graph for people.
            producer_version: version of this package.
            domains: domains of custom operators, with their versions.
        """
        read = {name for node in self.nodes for name in node.input}
        weights = [tensor for name, tensor in self._initializers.items() if name in read]
        # Shape inference and checker copy the model several times. To save memory, large weights are declared
        # as inputs for them, and added as initializers afterwards.
        large = [tensor for tensor in weights if len(tensor.raw_data) > _LARGE]
        stand_ins = [tensor_info(tensor.name, tensor.data_type, tensor.dims) for tensor in large]
        graph = helper.make_graph(
            self.nodes,
            name,
            [*inputs, *stand_ins],
            list(outputs),
            [tensor for tensor in weights if len(tensor.raw_data) <= _LARGE],
            doc_string=description,
        )
        model = helper.make_model(
            graph,
            opset_imports=[
                helper.make_opsetid("", opset),
                *(helper.make_opsetid(domain, version) for domain, version in (domains or {}).items()),
            ],
            producer_name="bnext-qat",
            producer_version=producer_version,
            ir_version=onnx.helper.find_min_ir_version_for([helper.make_opsetid("", opset)]),
        )
        helper.set_model_props(model, dict(sorted(metadata.items())))
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        onnx.checker.check_model(model, full_check=True)
        del model.graph.input[len(inputs) :], model.graph.initializer[:]
        model.graph.initializer.extend(weights)
        return model


def shorten_names(model: onnx.ModelProto, keep: Callable[[str], bool]) -> None:
    """Replace the names that only connect nodes by short ones, and drop inferred shapes, in place.

    Inputs and outputs of the graph, and tensors for which ``keep`` is true, keep their names. Nodes keep
    theirs, except conversions and constants, which runtimes fuse away.
    """
    graph = model.graph
    names: dict[str, str] = {value.name: value.name for value in (*graph.input, *graph.output)}

    def short(name: str) -> str:
        if name and name not in names:
            names[name] = name if keep(name) else f"t{len(names):x}"
        return names.get(name, "")

    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
    for node in graph.node:
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
        if node.op_type in _UNNAMED:
            node.name = ""
    del graph.value_info[:]


def tensor_info(name: str, element: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """Type and shape of a graph input or output."""
    return helper.make_tensor_value_info(name, element, list(shape))


FLOAT = TensorProto.FLOAT
INT32 = TensorProto.INT32
UINT8 = TensorProto.UINT8
