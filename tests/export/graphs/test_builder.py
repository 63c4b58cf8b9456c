"""The builder of ONNX graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from qat_export.graphs.builder import FLOAT, GraphBuilder, shorten_names, tensor_info


def finished(builder: GraphBuilder, **options: Any) -> onnx.ModelProto:
    arguments: dict[str, Any] = {
        "opset": 13,
        "metadata": {"b": "2", "a": "1"},
        "description": "d",
        "producer_version": "0",
    }
    inputs, outputs = ([tensor_info(name, FLOAT, ["batch", 2])] for name in ("x", "y"))
    return builder.model("g", inputs, outputs, **(arguments | options))


def test_equal_unnamed_constants_are_stored_once() -> None:
    builder = GraphBuilder()
    first = builder.constant(np.arange(3, dtype=np.int8))
    assert builder.constant(np.arange(3, dtype=np.int8)) == first


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.float32(0.0), np.float32(-0.0)),
        (np.uint8(1), np.int8(1)),
        (np.float32(1), np.float64(1)),
        (np.zeros(1, np.int8), np.int8(0)),
        (np.zeros((1, 2), np.int8), np.zeros((2, 1), np.int8)),
        (np.float32(1), np.nextafter(np.float32(1), np.float32(2))),
    ],
)
def test_constants_that_differ_in_value_type_or_shape_are_stored_apart(one: Any, other: Any) -> None:
    builder = GraphBuilder()
    assert builder.constant(one) != builder.constant(other)


def test_a_scalar_whose_value_equals_the_number_of_an_array_has_a_name_of_its_own() -> None:
    builder = GraphBuilder()
    array = builder.constant(np.arange(4, dtype=np.uint8))
    names = {builder.constant(np.uint8(value)) for value in range(8)}
    assert len(names) == 8
    assert array not in names


def test_a_scalar_that_came_first_leaves_room_for_the_array_of_its_number() -> None:
    builder = GraphBuilder()
    scalar = builder.constant(np.uint8(1))
    assert builder.constant(np.arange(4, dtype=np.uint8)) != scalar


@pytest.mark.parametrize("rows", [3, 30_000])  # small, and beyond what shape inference is shown
def test_a_constant_keeps_shape_type_and_values_through_the_model(rows: int) -> None:
    builder = GraphBuilder()
    value = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2).T  # not contiguous
    builder.node("Identity", [builder.constant(value, "kept")], "copy")
    builder.node("Identity", ["x"], "y")
    model = finished(builder)
    (tensor,) = model.graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), value)
    assert [entry.name for entry in model.graph.input] == ["x"]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    assert shapes["copy"] == [2, rows]


def test_a_constant_that_no_node_reads_is_left_out() -> None:
    builder = GraphBuilder()
    builder.constant(np.float32(1), "unused")
    builder.node("Identity", ["x"], "y")
    assert list(finished(builder).graph.initializer) == []


def test_a_name_given_twice_is_refused() -> None:
    builder = GraphBuilder()
    builder.constant(np.int8(1), "weight")
    with pytest.raises(ValueError, match="'weight' exists already"):
        builder.constant(np.int8(2), "weight")


def test_a_node_is_named_after_its_output() -> None:
    builder = GraphBuilder()
    assert builder.node("Relu", ["x"], "y") == "y"
    assert finished(builder).graph.node[0].name == "y"


def test_metadata_are_sorted_so_that_the_bytes_do_not_depend_on_their_order() -> None:
    models = []
    for metadata in ({"b": "2", "a": "1"}, {"a": "1", "b": "2"}):
        builder = GraphBuilder()
        builder.node("Relu", ["x"], "y")
        models.append(finished(builder, metadata=metadata).SerializeToString(deterministic=True))
    assert models[0] == models[1]


@pytest.mark.parametrize(
    ("operator", "inputs"), [("NoSuchOperator", ["x"]), ("Relu", ["missing"]), ("Add", ["x"])]
)
def test_an_invalid_graph_is_refused_before_it_is_written(operator: str, inputs: list[str]) -> None:
    builder = GraphBuilder()
    builder.node(operator, inputs, "y")
    with pytest.raises((onnx.checker.ValidationError, onnx.shape_inference.InferenceError)):
        finished(builder)


def test_short_names_keep_what_is_asked_for_and_connect_the_same_nodes() -> None:
    builder = GraphBuilder()
    doubled = builder.node("Add", ["x", "x"], "a long name")
    kept = builder.node("Clip", [doubled, "", builder.constant(np.float32(3), "bound")], "kept")
    builder.node("Transpose", [kept], "out", perm=[0, 1])
    info = [tensor_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in ("x", "out")]
    model = builder.model(
        "test", info[:1], info[1:], opset=13, metadata={}, description="", producer_version="0"
    )
    x = np.array([[1, 2], [-1, 0]], np.float32)

    def result() -> np.ndarray[Any, Any]:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"x": x})[0])

    before = result()
    shorten_names(model, lambda name: name == "kept")
    np.testing.assert_array_equal(result(), before)
    add, clip, last = model.graph.node
    assert (clip.output[0], list(clip.input)[1], last.output[0]) == ("kept", "", "out")
    assert len(add.output[0]) <= 3
    assert [node.name for node in model.graph.node] == ["a long name", "kept", ""]
    assert list(model.graph.value_info) == []
