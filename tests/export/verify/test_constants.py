"""Constants of an exported file against those of its network."""

from __future__ import annotations

import functools

import onnx
import pytest
from qat_export.graphs.metadata import InputKind
from qat_export.graphs.portable import emit_portable
from qat_export.integer.network import IntegerNetwork
from qat_export.verify.constants import compare_constants

from tests.helpers.cases import slow
from tests.helpers.networks import lowered, toy


@functools.cache
def small() -> IntegerNetwork:
    return lowered(toy(1, widths=(8, 16)))


@pytest.mark.parametrize("kind", ["float32 NCHW", "uint8 NCHW", "uint8 NHWC"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("size", [16, 24])
def test_all_constants_of_a_fresh_export_are_equal(kind: InputKind, strict: bool, size: int) -> None:
    model = emit_portable(small(), size, input_kind=kind, strict=strict)
    found = compare_constants(model, small(), kind, size)
    assert len(found) == len(model.graph.initializer)
    assert {tensor.different for tensor in found} == {0}
    weights = sum(affine.weight.size for affine in small().affines())
    signs = sum(sub.conv.sign_bits.size for sub in small().sub_blocks())
    assert sum(tensor.elements for tensor in found) > weights + signs


@pytest.mark.parametrize("strict", [False, slow(True)])
def test_one_flipped_bit_in_any_constant_is_seen(strict: bool) -> None:
    model = emit_portable(small(), strict=strict)
    for index, tensor in enumerate(model.graph.initializer):
        content = tensor.raw_data
        tensor.raw_data = bytes([content[0] ^ 1]) + content[1:]
        found = compare_constants(model, small(), "float32 NCHW", 16)
        assert [entry.different for entry in found] == [int(i == index) for i in range(len(found))]
        tensor.raw_data = content
    assert len(model.graph.initializer) > 50


def test_a_constant_is_named_after_the_node_that_reads_it() -> None:
    found = compare_constants(emit_portable(small()), small(), "float32 NCHW", 16)
    names = {tensor.name for tensor in found}
    spatial = small().blocks[0].spatial.name
    assert f"{spatial}/conv, input 8" in names  # the bias of a QLinearConv
    nodes = {node.name for node in emit_portable(small()).graph.node if node.name}
    assert {name.rpartition(", input ")[0] for name in names} <= nodes | {"logits"}


def test_names_and_comments_of_nodes_are_no_difference() -> None:
    model = emit_portable(small())
    model.graph.node[3].name += "_"
    model.graph.node[4].doc_string = "seen by another tool"
    assert len(compare_constants(model, small(), "float32 NCHW", 16)) == len(model.graph.initializer)


def test_a_graph_with_other_nodes_is_not_compared() -> None:
    model = emit_portable(small())
    model.graph.node[3].output[0] += "_"
    assert compare_constants(model, small(), "float32 NCHW", 16) == []
    model = emit_portable(small())
    model.graph.initializer[0].name += "_"
    assert compare_constants(model, small(), "float32 NCHW", 16) == []
    other = lowered(toy(1, widths=(8, 8)))
    assert compare_constants(emit_portable(other), small(), "float32 NCHW", 16) == []
    assert compare_constants(onnx.ModelProto(), small(), "float32 NCHW", 16) == []


def test_a_graph_for_another_image_size_has_other_constants() -> None:
    found = compare_constants(emit_portable(small(), 24), small(), "float32 NCHW", 16)
    assert found == [] or any(tensor.different for tensor in found)
