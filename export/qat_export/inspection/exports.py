"""Inspection of exported models and integer networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from qat.errors import CheckpointError, first_line
from qat.inspection.facts import (
    PLUS_MINUS_ONE,
    SIGN_BITS,
    InspectedLayer,
    Inspection,
    Total,
    facts_of,
    parsed,
)
from qat_export.graphs.native import FORMAT as NATIVE_FORMAT
from qat_export.inspection.weight_graph import Array, WeightGraph, exact_share, value_range
from qat_export.integer.fields import named_arrays
from qat_export.integer.file import load_network
from qat_export.integer.listing import layers as describe_layers
from qat_export.integer.network import IntegerNetwork
from qat_export.verify.model import OnnxModel, normalization


def inspect_network(path: Path) -> Inspection:
    """Describe the integer network in the file ``path``.

    Raises:
        CheckpointError: see :func:`qat_export.integer.file.load_network`.
    """
    network = load_network(path)
    layers = tuple(_network_layers(network))
    arrays = [array for _, array in named_arrays(network)]
    in_layers = sum(layer.size for layer in layers)
    packed = sum(layer.size for layer in layers if layer.stored == SIGN_BITS)
    other = Total(
        sum(array.size for array in arrays)
        - packed
        - sum(x.weights for x in layers if x.stored != SIGN_BITS),
        sum(array.nbytes for array in arrays) - in_layers,
    )
    facts = facts_of(network.metadata) | {
        "image_size": network.image_size,
        "mean": list(network.mean),
        "std": list(network.std),
        "class_names": list(network.class_names),
    }
    return Inspection(
        path=str(path),
        format="bnext-qat integer network",
        file_size=path.stat().st_size,
        architecture=network.architecture,
        widths=_widths(layers),
        num_classes=len(network.class_names),
        layers=layers,
        other=other,
        facts=facts,
        exported=True,
    )


def inspect_onnx(path: Path) -> Inspection:
    """Describe the exported model in the file ``path``.

    Raises:
        CheckpointError: the file is absent, damaged, or no model of this project. If a tensor is missing or
            damaged, the message names it.
    """
    exported = OnnxModel(path)
    try:
        graph = WeightGraph(onnx.load(path, load_external_data=False), path)
    except CheckpointError:
        raise
    except Exception as error:  # the exceptions of protobuf and onnx share no base class
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error
    kind = exported.metadata["format"]
    as_float = kind.startswith("bnext-qat float")
    native = kind == NATIVE_FORMAT
    if not as_float and not native and not kind.startswith("bnext-qat portable"):
        raise CheckpointError(f"{path}: metadata 'format' is {kind!r}, which this version doesn't know")
    facts = facts_of(exported.metadata)
    layers = tuple(graph.layers(as_float, parsed(exported.metadata.get("grids", "{}"))))
    arrays = graph.arrays.values()
    counted = [array for name, array in graph.arrays.items() if name not in graph.weights]
    form = "float32" if as_float else "native" if native else "portable"
    if form == "portable" and "QLinearConv" not in graph.operators:
        form = "portable, strict form"
    return Inspection(
        path=str(path),
        format=f"bnext-qat ONNX model, {form}",
        file_size=path.stat().st_size,
        architecture=exported.metadata.get("architecture", "BNext of unknown size"),
        widths=_widths(layers),
        num_classes=exported.num_classes,
        layers=layers,
        other=Total(
            sum(array.size for array in counted),
            sum(array.nbytes for array in arrays) - sum(layer.size for layer in layers),
        ),
        facts=facts
        | {"image_size": exported.image_size, "input": exported.input_kind}
        | {key: list(values) for key, values in normalization(exported.metadata, path).items()},
        exported=True,
    )


def _network_layers(network: IntegerNetwork) -> Iterator[InspectedLayer]:
    weights: dict[str, list[Array]] = {
        "feature.0": [network.stem.conv.weight],
        "fc": [network.head.classifier.weight],
    }
    for sub in network.sub_blocks():
        weights[sub.name] = [sub.conv.weight()]
        if sub.attention is not None:
            weights[f"{sub.name}.se"] = [sub.attention.reduce.weight, sub.attention.expand.weight]
    for layer in describe_layers(network):
        arrays = weights[layer.name]
        binary = layer.bits == 1
        share = exact_share(arrays[0]) if binary else None
        yield InspectedLayer(
            layer.name,
            layer.kind,
            # With sides of 1, as in a checkpoint, where the layers of an attention are 1×1 convolutions.
            tuple(array.shape + (1, 1) * (layer.kind == "attention") for array in arrays),
            stored=SIGN_BITS if binary else arrays[0].dtype.name,
            bits=1 if binary else 8 * arrays[0].itemsize,
            size=layer.size,
            values=value_range(arrays),
            in_use=PLUS_MINUS_ONE if binary else f"int{layer.bits}",
            result=layer.result,
            exact_stored=share,
            exact_in_use=share,
            multiplier=layer.multipliers,
        )


def _widths(layers: tuple[InspectedLayer, ...]) -> tuple[int, ...]:
    """Number of channels after the stem and after each block, from the inputs of the layers that follow."""
    spatial = {
        layer.name.split(".")[1]: layer.shapes[0][0] for layer in reversed(layers) if layer.name != "fc"
    }
    blocks = sorted((int(index), channels) for index, channels in spatial.items() if index != "0")
    return (*(channels for _, channels in blocks), layers[-1].shapes[0][1])
