"""Weights in exported graphs: what bits are unpacked to, and every way in which a layer can be damaged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from qat_export.graphs.float32 import emit_float
from qat_export.inspection.weight_graph import WeightGraph, exact_share, value_range

from qat.errors import CheckpointError
from qat.inspection.facts import InspectedLayer
from tests.helpers.networks import MEAN, STD, float_network, ordinary

BITS = "feature.1.Attention/binary_weight.bits"
Model = onnx.ModelProto


@pytest.fixture
def model() -> Model:
    """A portable model of this test's own."""
    return copy.deepcopy(ordinary()[2])


def layers(model: Model, as_float: bool = False) -> list[InspectedLayer]:
    return list(WeightGraph(model, Path("m.onnx")).layers(as_float, {}))


def initializer(model: Model, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def change(model: Model, name: str, values: NDArray[np.generic]) -> None:
    initializer(model, name).CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))


def rename(model: Model, name: str) -> None:
    """Call an initializer ``other``, wherever it is read."""
    initializer(model, name).name = "other"
    for node in model.graph.node:
        node.input[:] = ["other" if value == name else value for value in node.input]


def refused(model: Model, as_float: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        layers(model, as_float)
    message = str(caught.value)
    assert message.startswith("m.onnx: ")
    assert "\n" not in message
    return message.removeprefix("m.onnx: ")


def test_sign_bits_are_unpacked_to_the_weights_of_the_network(model: Model) -> None:
    found = {layer.name: layer for layer in layers(model)}
    for sub in ordinary()[1].sub_blocks():
        layer = found[sub.name]
        assert layer.shapes == (sub.conv.shape,)
        assert layer.multiplier == (float(sub.conv.multiplier.min()), float(sub.conv.multiplier.max()))
        assert (layer.values, layer.exact_in_use) == ((-1.0, 1.0), 1.0)


def test_layers_are_in_forward_order_whatever_the_order_of_the_initializers(model: Model) -> None:
    expected = layers(model)
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(reversed(tensors))
    assert layers(model) == expected
    assert [layer.name for layer in expected][:: len(expected) - 1] == ["feature.0", "fc"]


def test_a_table_of_other_values_makes_weights_that_are_not_binary(model: Model) -> None:
    """What is stored is judged by what the graph unpacks it to, not by its name."""
    (name,) = (tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [256, 8])
    table = numpy_helper.to_array(initializer(model, name)).copy()
    table[:, 0] = 0
    change(model, name, table)
    binary = [layer for layer in layers(model) if layer.is_binary_convolution]
    assert {layer.exact_in_use for layer in binary} == {7 / 8}
    assert not any(layer.binary for layer in binary)


def test_too_few_sign_bits_are_refused_naming_them(model: Model) -> None:
    change(model, BITS, numpy_helper.to_array(initializer(model, BITS))[:-1])
    assert refused(model) == f"{BITS}: damaged: uint8 [71], expected uint8 [72] for weights [8, 8, 3, 3]"


def _one_node_more(model: Model) -> None:
    (cast,) = (node for node in model.graph.node if BITS in node.input)
    position = list(model.graph.node).index(cast)
    model.graph.node.insert(position, onnx.helper.make_node("Identity", [BITS], ["middle"]))
    model.graph.node[position + 1].input[:] = ["middle"]


def _no_reshape(model: Model) -> None:
    (node,) = (node for node in model.graph.node if "feature.1.Attention/binary_weight" in node.output)
    node.output[0] = "elsewhere"


def _table_of_16(model: Model) -> None:
    (name,) = (tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [256, 8])
    change(model, name, np.ones((256, 16), np.int8))


@pytest.mark.parametrize("damage", [_one_node_more, _no_reshape, _table_of_16])
def test_bits_unpacked_in_another_way_are_refused_naming_them(
    model: Model, damage: Callable[[Model], None]
) -> None:
    damage(model)
    assert refused(model).startswith(f"{BITS}: is not unpacked to 'feature.1.Attention/binary_weight'")


@pytest.mark.parametrize(
    ("name", "role"), [("fc.weight", "classifier"), ("feature.0/trunk.weight", "stem")], ids=["fc", "stem"]
)
def test_a_missing_layer_is_refused_naming_its_role(model: Model, name: str, role: str) -> None:
    rename(model, name)
    message = refused(model)
    assert message.startswith(
        f"says that it is a BNext, but has no initializer named like the weights of a {role}"
    )


def test_half_an_attention_is_refused_naming_it(model: Model) -> None:
    rename(model, "feature.1.Attention/hidden.weight")
    assert refused(model) == "feature.1.Attention: half of the attention's weights are missing"


def test_a_weight_without_a_multiplier_behind_it_is_refused(model: Model) -> None:
    for node in list(model.graph.node):
        if "fc.weight" in node.input:
            model.graph.node.remove(node)
    assert refused(model) == "fc.weight: no multiplier behind it, as every layer of ours has"


def test_an_initializer_of_the_wrong_size_is_refused_naming_it(model: Model) -> None:
    tensor = initializer(model, "fc.weight")
    tensor.raw_data = tensor.raw_data[:-3]
    assert refused(model).startswith("fc.weight: damaged: ")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.full((10, 32), np.nan, np.float32), "holds values that are not finite"),
        (np.zeros((10, 0), np.float32), "is empty"),
    ],
    ids=["NaN", "empty"],
)
def test_weights_that_are_no_numbers_are_refused_naming_them(
    values: NDArray[np.float32], problem: str
) -> None:
    floating = emit_float(float_network(), image_size=16, mean=MEAN, std=STD)
    change(floating, "fc.weight", values)
    assert refused(floating, as_float=True) == f"fc.weight: damaged: {problem}"


def test_shares_and_ranges_are_those_of_all_values() -> None:
    assert exact_share(np.array([1, -1, 0.5, 0])) == 0.5
    assert value_range([np.array([1, 3]), np.array([-2, 0])]) == (-2.0, 3.0)
