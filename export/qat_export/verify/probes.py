"""Make integers inside a model outputs of it: its named tensors, and the sums of its binary convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qat.grid import Grid
from qat_export.integer.network import IntegerNetwork, SubBlock
from qat_export.nativelibrary import DOMAIN

Array = NDArray[Any]


def tensor_names(model: onnx.ModelProto, network: IntegerNetwork) -> dict[str, str]:
    """Names of tensors in ``network.grids``, mapped to those in the graph, for the tensors it has."""
    produced = {output for node in model.graph.node for output in node.output}
    names = {name: "image/uint8" if name == "image" else name for name in network.grids}
    return {name: tensor for name, tensor in names.items() if tensor in produced}


def inside_operators(model: onnx.ModelProto, network: IntegerNetwork) -> set[str]:
    """Names of tensors of ``network`` that exist only inside native operators; empty without these."""
    if all(node.domain != DOMAIN for node in model.graph.node):
        return set()
    seen = {"image", "feature.0/trunk", "head/input"}
    for block in network.blocks:
        seen |= {f"{block.name}/trunk_mid", f"{block.name}/trunk_out"}
    seen |= {f"{sub.name}/y" for sub in network.sub_blocks()}
    return (set(network.grids) | {f"{sub.name}/sum" for sub in network.sub_blocks()}) - seen


def with_outputs(model: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """A copy of ``model`` with ``tensors`` as additional outputs; runtimes infer their types."""
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    extended.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in tensors)
    return extended


def integers(values: Array, grid: Grid) -> Array:
    """Convert a tensor of a graph to the integers and the layout of the interpreter.

    Graphs store integers as uint8 (signed ones plus 128), or in other types relative to the zero point. int8
    activations are those of native operators, and have channels last.
    """
    if values.dtype == np.int8:
        return values.astype(np.int16).transpose(0, 3, 1, 2) if values.ndim == 4 else values.astype(np.int16)
    if values.dtype == np.uint8:
        return values.astype(np.int16) - (128 if grid.signed else 0)
    return values + grid.zero_point if grid.zero_point else values


def sub_block_inputs(network: IntegerNetwork) -> Iterator[tuple[SubBlock, str]]:
    """Each sub-block with the name of the trunk tensor that it reads."""
    trunk = "feature.0/trunk"
    for block in network.blocks:
        yield block.spatial, trunk
        for sub in block.pointwise:
            yield sub, f"{block.name}/trunk_mid"
        trunk = f"{block.name}/trunk_out"


def with_sums(model: onnx.ModelProto, network: IntegerNetwork) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A copy of ``model`` with a tensor for the sum of each binary convolution, times ACCUMULATOR_UNIT.

    A QLinearConv requantizes its sum, so a ConvInteger that reads the same tensors is added beside it. The
    sum of a Conv is a tensor already.

    Returns:
        The copy, and the tensor of the sum by the name of the sub-block. Sub-blocks whose convolution is
        another operator are missing.
    """
    extended = with_outputs(model, ())
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    sums = {}
    for sub, trunk in sub_block_inputs(network):
        node = producers.get(f"{sub.name}/conv") if trunk in producers else None
        while node is not None and node.op_type not in ("QLinearConv", "Conv"):
            node = producers.get(node.input[0])
        if node is None:
            continue
        if node.op_type == "Conv":
            sums[sub.name] = node.output[0]
            continue
        x, _, x_zero, weight, _, weight_zero = node.input[:6]
        if weight_zero not in constants or onnx.numpy_helper.to_array(constants[weight_zero]).any():
            continue
        sums[sub.name] = f"{sub.name}/sum"
        probe = extended.graph.node.add(op_type="ConvInteger", name=sums[sub.name])
        probe.input.extend([x, weight, x_zero])
        probe.output.append(sums[sub.name])
        probe.attribute.extend(node.attribute)
    return extended, sums
