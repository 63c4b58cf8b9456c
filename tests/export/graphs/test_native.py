"""The native target: every tensor of whole networks equals the interpreter, with each set of kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from qat_export.graphs.metadata import InputKind
from qat_export.graphs.native import FORMAT, emit_native, packed_weight
from qat_export.graphs.portable import emit_portable
from qat_export.inspection.exports import inspect_onnx
from qat_export.nativelibrary import DOMAIN
from qat_export.verify.exactness import check_exactness
from qat_export.verify.model import OnnxModel

from qat.errors import NativeLibraryError, QuantizationError
from qat.inspection.facts import PLUS_MINUS_ONE, SIGN_BITS
from qat.native.library import KERNELS_VARIABLE, LIBRARY_VARIABLE
from tests.helpers.cases import combinations, exhaustive, slow
from tests.helpers.native_models import KERNELS, needs_library
from tests.helpers.networks import (
    float_network,
    lowered,
    make_extreme,
    ordinary,
    prepared,
    quantization,
    saved,
    toy,
    with_conv,
)

#: What an operator's name is followed by in the domain's list.
OPERATORS = {"Stem", "BinaryConv", "ChannelAttention", "TrunkUpdate", "ChannelSums"}


def random(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def problems(network: object, model: onnx.ModelProto, size: int, count: int = 4) -> list[str]:
    """What is missing or differs in a single element."""
    result = check_exactness(model, network, random(count, size), batches=(1, count))  # type: ignore[arg-type]
    assert result.constants_compared
    return [*result.missing, *(t.name for t in result.tensors if t.different), *result.problems()]


@needs_library
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_tensor_of_a_network_equals_the_interpreter_with_each_set_of_kernels(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, kernels)
    network = ordinary()[1]
    result = check_exactness(emit_native(network), network, random(8, 16), batches=(1, 8))
    assert (result.missing, result.problems()) == ((), [])
    compared = {tensor.name for tensor in result.tensors if tensor.optimizations == "on"}
    assert {f"{sub.name}/y" for sub in network.sub_blocks()} <= compared
    assert {name for name in network.grids if "/trunk" in name} <= compared
    assert {"head/input", "logits"} <= compared
    assert {tensor.different for tensor in result.tensors} == {0}


@needs_library
@combinations({"stem_stride": [1, 2], "size": [1, exhaustive(8), 9, exhaustive(13), 31]})
def test_images_of_any_size_are_exact(size: int, stem_stride: int) -> None:
    network = lowered(toy(1, stem_stride=stem_stride))
    assert problems(network, emit_native(network, size), size) == []


@needs_library
@pytest.mark.parametrize("options", [{"elm_attention": False}, slow({"infor_recoupling": False})], ids=str)
def test_an_ablated_network_is_exact_too(options: dict[str, bool]) -> None:
    network = lowered(toy(4, **options))
    assert problems(network, emit_native(network), 16) == []


@needs_library
@pytest.mark.parametrize("bits", [2, 3, exhaustive(4), exhaustive(6)])
def test_every_width_in_bits_is_exact(bits: int) -> None:
    network = lowered(toy(2, quantization(trunk=bits, se=bits, se_weight=bits, classifier=bits)))
    assert problems(network, emit_native(network), 16) == []


@needs_library
@pytest.mark.parametrize("seed", [0, slow(1), slow(2), *map(exhaustive, (3, 4, 5))])
def test_extreme_parameters_are_exact(seed: int) -> None:
    model = float_network(seed, size=12)
    make_extreme(model, seed)
    network = lowered(prepared(model, size=12, seed=seed))
    assert problems(network, emit_native(network, 12), 12) == []


@needs_library
@pytest.mark.parametrize("widths", [(32, 64, 64), (40, 80, 80), (7, 7, 14)], ids=str)
def test_channels_that_fill_vectors_and_channels_that_do_not_are_exact(widths: tuple[int, ...]) -> None:
    network = lowered(toy(3, widths=widths))
    assert problems(network, emit_native(network, 10), 10) == []


@needs_library
@pytest.mark.parametrize("kind", ["float32 NCHW", "uint8 NCHW", "uint8 NHWC"])
def test_every_kind_of_input_is_exact(kind: InputKind) -> None:
    network = ordinary()[1]
    assert problems(network, emit_native(network, input_kind=kind), 16) == []


@needs_library
def test_a_flipped_sign_bit_is_seen() -> None:
    network = ordinary()[1]
    sub = network.blocks[0].spatial
    bits = sub.conv.sign_bits.copy()
    bits[3] ^= 16
    found = problems(network, emit_native(with_conv(network, sub.name, sign_bits=bits)), 16)
    assert f"{sub.name}/y" in found


def test_the_trunk_is_the_domains_alone_and_weights_stay_packed() -> None:
    network = ordinary()[1]
    model = emit_native(network)
    ours = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
    subs = list(network.sub_blocks())
    assert set(ours) == OPERATORS
    assert [ours.count(name) for name in ("BinaryConv", "TrunkUpdate")] == [len(subs)] * 2
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 13), (DOMAIN, 1)}
    assert {entry.key: entry.value for entry in model.metadata_props}["format"] == FORMAT
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for sub in subs:
        bits = stored[f"{sub.name}/binary_weight.bits"]
        k, channels = sub.conv.kernel_size, sub.conv.channels
        assert tuple(bits.dims) == (channels, k, k, -(-channels // 8))
    assert emit_native(network) == model  # the same bytes every time


def test_weights_are_packed_as_the_operator_reads_them() -> None:
    conv = ordinary()[1].blocks[0].spatial.conv
    packed, weight = packed_weight(conv), conv.weight()
    rng = np.random.default_rng(0)
    for _ in range(50):
        o, i = rng.integers(conv.channels, size=2)
        y, x = rng.integers(conv.kernel_size, size=2)
        assert (packed[o, y, x, i // 8] >> (i % 8) & 1) == (weight[o, i, y, x] == 1)


def test_an_image_size_of_zero_is_refused() -> None:
    with pytest.raises(QuantizationError, match="image size of 0"):
        emit_native(ordinary()[1], 0)


def test_a_model_without_its_library_is_refused_in_words_that_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(emit_native(ordinary()[1]), tmp_path / "native.onnx")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    said = r"native\.onnx: has native operators; .*none\.so: no such file"
    with pytest.raises(NativeLibraryError, match=said):
        OnnxModel(path)


def test_portable_models_need_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(emit_portable(ordinary()[1]), tmp_path / "model.onnx")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    assert OnnxModel(path).num_classes == 10


@needs_library
def test_inspection_finds_every_layer_with_its_bits(tmp_path: Path) -> None:
    network = ordinary()[1]
    native = inspect_onnx(saved(emit_native(network), tmp_path / "native.onnx"))
    portable = inspect_onnx(saved(emit_portable(network), tmp_path / "model.onnx"))
    assert native.format == "bnext-qat ONNX model, native"
    assert [
        (x.name, x.kind, x.shapes, x.values, x.in_use, x.result, x.multiplier) for x in native.layers
    ] == [(x.name, x.kind, x.shapes, x.values, x.in_use, x.result, x.multiplier) for x in portable.layers]
    binary = [layer for layer in native.layers if layer.stored == SIGN_BITS]
    assert len(binary) == len(list(network.sub_blocks()))
    assert {layer.in_use for layer in binary} == {PLUS_MINUS_ONE}


@needs_library
def test_inspection_reads_a_model_whose_absent_inputs_were_cut_off(tmp_path: Path) -> None:
    model = emit_native(ordinary()[1])
    before = inspect_onnx(saved(model, tmp_path / "before.onnx"))
    for node in model.graph.node:
        while node.input and not node.input[-1]:
            del node.input[-1]
    after = inspect_onnx(saved(model, tmp_path / "after.onnx"))
    assert [layer.kind for layer in after.layers] == [layer.kind for layer in before.layers]
    assert {"bias 3×3", "scale 3×3"} <= {layer.kind for layer in after.layers}
