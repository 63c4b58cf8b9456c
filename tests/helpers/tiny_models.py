"""Small ONNX models that this project did not make, for the tests of what runs any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str | None]


def image_model(
    path: Path, shape: Shape = ("batch", 3, 8, 8), element: int = TensorProto.FLOAT, scale: float = 1.0
) -> Path:
    """A model whose output is the mean of its input times ``scale``."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["real"], ["mean"]),
        helper.make_node("Mul", ["mean", "scale"], ["score"]),
    ]
    scale_tensor = numpy_helper.from_array(np.float32(scale).reshape(1), "scale")
    return save(path, nodes, [("pixels", element, shape)], [scale_tensor])


def weighty_model(path: Path, floats: int) -> Path:
    """A model of one multiplication with that many weights, nothing of which can be computed at load time."""
    side = 64
    weights = numpy_helper.from_array(
        np.ones((3 * side * side, floats // (3 * side * side)), np.float32), "w"
    )
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["score"]),
    ]
    return save(path, nodes, [("pixels", TensorProto.FLOAT, ["batch", 3, side, side])], [weights])


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[tuple[str, int, Shape | None]],
    initializers: Sequence[onnx.TensorProto] = (),
    *,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a model with these inputs whose output is ``score``."""
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, None)],
        list(initializers),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    path.write_bytes(model.SerializeToString())
    return path
