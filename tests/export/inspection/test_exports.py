"""Exports inspected: each form of .onnx file, and integer networks, against the networks they came from."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
from qat_export.graphs.float32 import emit_float
from qat_export.graphs.metadata import InputKind
from qat_export.graphs.portable import emit_portable
from qat_export.inspection.exports import inspect_network, inspect_onnx
from qat_export.integer.file import save_network
from qat_export.integer.listing import layers as described

from qat.errors import CheckpointError
from qat.inspection.facts import SIGN_BITS, Inspection
from qat.inspection.verdict import verdict
from qat.models.bnext import BNext, binary_convolutions, set_temperature
from tests.helpers.networks import MEAN, STD, float_network, lowered, ordinary, quantization, saved, toy
from tests.helpers.tiny_models import image_model

VERDICT = "binary: yes, 6,080 weights at 1 bit; 8 of 8 layers; rest int8"
FORMS: dict[str, tuple[InputKind, bool]] = {
    "portable": ("float32 NCHW", False),
    "pixels": ("uint8 NHWC", False),
    "strict": ("float32 NCHW", True),
    "strict pixels": ("uint8 NCHW", True),
}


@functools.cache
def model(form: str) -> onnx.ModelProto:
    kind, strict = FORMS[form]
    return emit_portable(ordinary()[1], input_kind=kind, strict=strict)


def floating(network: BNext) -> onnx.ModelProto:
    return emit_float(network, image_size=16, mean=MEAN, std=STD, class_names=tuple("abcdefghij"))


def refused(model: onnx.ModelProto, folder: Path) -> str:
    path = saved(model, folder / "m.onnx")
    with pytest.raises(CheckpointError) as caught:
        inspect_onnx(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def layer_facts(found: Inspection) -> list[tuple[object, ...]]:
    """What must be the same in every integer form."""
    return [
        (x.name, x.kind, x.bits, x.size, x.values, x.in_use, x.result, x.exact_in_use, x.multiplier)
        for x in found.layers
    ]


@pytest.mark.parametrize("form", FORMS)
def test_every_integer_form_holds_the_layers_of_the_network_it_came_from(form: str, tmp_path: Path) -> None:
    found = inspect_onnx(saved(model(form), tmp_path / "m"))
    save_network(ordinary()[1], tmp_path / "n")
    network = inspect_network(tmp_path / "n")
    assert layer_facts(found) == layer_facts(network)
    assert found.widths == network.widths == (8, 16, 16, 32)
    assert (found.size, found.num_classes) == ("custom", 10)
    assert verdict(found).line == verdict(network).line == VERDICT
    assert found.facts["input"] == FORMS[form][0]
    assert found.facts["mean"] == pytest.approx(MEAN)
    assert found.facts["run"] == "a test"
    strict = FORMS[form][1]
    assert found.format == f"bnext-qat ONNX model, portable{', strict form' if strict else ''}"


def test_an_integer_network_is_described_as_its_listing_describes_it(tmp_path: Path) -> None:
    network = ordinary()[1]
    save_network(network, tmp_path / "n")
    found = inspect_network(tmp_path / "n")
    assert found.format == "bnext-qat integer network"
    listed = [(x.name, x.weights, x.size, x.result, x.multipliers) for x in described(network)]
    assert [(x.name, x.weights, x.size, x.result, x.multiplier) for x in found.layers] == listed
    assert {x.stored for x in found.binary_layers} == {SIGN_BITS}
    assert {(x.stored, x.bits) for x in found.rest_layers} == {("int8", 8)}
    assert found.facts["image_size"] == 16
    size = sum(total.size for total in found.totals().values()) + found.container_size
    assert size == found.file_size


def test_bits_are_those_that_the_initializers_hold(tmp_path: Path) -> None:
    found = inspect_onnx(saved(model("portable"), tmp_path / "m"))
    sizes = {tensor.name: len(tensor.raw_data) for tensor in model("portable").graph.initializer}
    for layer in found.binary_layers:
        assert layer.size == sizes[f"{layer.name}/binary_weight.bits"] == layer.weights // 8
    assert sum(total.size for total in found.totals().values()) == sum(sizes.values())
    count = sum(int(np.prod(tensor.dims)) for tensor in model("portable").graph.initializer)
    packed = sum(layer.size for layer in found.binary_layers)
    weights = sum(layer.weights for layer in found.rest_layers)
    assert found.totals()["other"].count == count - packed - weights


def test_weights_that_fill_no_whole_byte_are_counted_as_they_are_used(tmp_path: Path) -> None:
    network = lowered(toy(widths=(2, 2)))
    found = inspect_onnx(saved(emit_portable(network), tmp_path / "m"))
    (spatial, pointwise) = found.binary_layers
    assert (spatial.weights, spatial.size) == (36, 5)
    assert (pointwise.weights, pointwise.size) == (4, 1)
    assert verdict(found).line.startswith("binary: yes, 40 weights at 1 bit; 2 of 2 layers")


def test_four_bit_attention_is_used_at_four_bits_and_stored_at_eight(tmp_path: Path) -> None:
    network = lowered(toy(bits=quantization(se_weight=4)))
    found = inspect_onnx(saved(emit_portable(network), tmp_path / "m"))
    attentions = {(x.in_use, x.bits) for x in found.rest_layers if x.kind == "attention"}
    assert attentions == {("int4", 8)}
    assert verdict(found).line.endswith("; rest int4 and int8")


def test_a_float_export_holds_binary_weights_as_float_numbers(tmp_path: Path) -> None:
    network = float_network()
    found = inspect_onnx(saved(floating(network), tmp_path / "m"))
    assert found.format == "bnext-qat ONNX model, float32"
    assert found.widths == (8, 16, 16, 32)
    assert {(x.stored, x.bits, x.exact_in_use) for x in found.binary_layers} == {("float32", 32, 1.0)}
    assert [x.kind for x in found.layers[:3]] == ["stem", "bias 3×3", "attention"]
    assert "scale 3×3" in {x.kind for x in found.layers}
    assert verdict(found).line == (
        "binary: yes in use, but stored as float32: 6,080 weights at 32 bits; 8 of 8 layers; rest float32 "
        "(qat export --onnx without --float32 writes them at 1 bit)"
    )


def test_a_float_export_that_is_not_binary_yet_has_the_share_of_the_weights_in_use(tmp_path: Path) -> None:
    network = float_network()
    set_temperature(network, 0.3)
    found = inspect_onnx(saved(floating(network), tmp_path / "m"))
    for name, conv in binary_convolutions(network).items():
        used = (conv.weight.detach() / 0.3).clamp(-1, 1).abs()
        (layer,) = (x for x in found.layers if x.name == name.removesuffix(".binary_conv"))
        assert layer.exact_in_use == int((used == 1).sum()) / used.numel()
        assert layer.values == pytest.approx((-1, 1), abs=1.0)
    assert verdict(found).answer == "not yet"


# Refusals.


def test_a_model_of_other_origin_is_refused_with_its_inputs(tmp_path: Path) -> None:
    path = image_model(tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match=r"not exported by this tool: .* found inputs \['pixels'\]"):
        inspect_onnx(path)


def test_a_form_of_the_future_is_refused(tmp_path: Path) -> None:
    changed = copy.deepcopy(model("portable"))
    (entry,) = (entry for entry in changed.metadata_props if entry.key == "format")
    entry.value = "bnext-qat analog 1"
    assert "metadata 'format' is 'bnext-qat analog 1', which this version doesn't know" in refused(
        changed, tmp_path
    )


def test_an_initializer_of_the_wrong_size_is_refused_naming_it(tmp_path: Path) -> None:
    changed = copy.deepcopy(model("portable"))
    (tensor,) = (tensor for tensor in changed.graph.initializer if tensor.name == "fc.weight")
    tensor.raw_data = tensor.raw_data[:-3]
    assert "fc.weight" in refused(changed, tmp_path)


def test_a_cut_or_absent_integer_network_is_refused_naming_the_file(tmp_path: Path) -> None:
    path = tmp_path / "n"
    with pytest.raises(CheckpointError, match="no such file"):
        inspect_network(path)
    save_network(ordinary()[1], path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        inspect_network(path)
