"""A small builder of ONNX graphs: named nodes, shared initializers, reproducible bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]


class GraphBuilder:
    """Collects nodes and initializers; equal initializers are stored once.

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
    ) -> onnx.ModelProto:
        """The finished model: shapes inferred, checked by ``onnx.checker``, the same bytes every time."""
        graph = helper.make_graph(
            self.nodes,
            name,
            list(inputs),
            list(outputs),
            list(self._initializers.values()),
            doc_string=description,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            producer_name="bnext-qat",
            producer_version=producer_version,
            ir_version=onnx.helper.find_min_ir_version_for([helper.make_opsetid("", opset)]),
        )
        helper.set_model_props(model, dict(sorted(metadata.items())))
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        onnx.checker.check_model(model, full_check=True)
        return model


def tensor_info(name: str, element: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """Type and shape of a graph input or output."""
    return helper.make_tensor_value_info(name, element, list(shape))


FLOAT = TensorProto.FLOAT
INT32 = TensorProto.INT32
