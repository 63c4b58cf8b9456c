"""The portable ONNX target, the interpreter and torch agree bit for bit; what the graph is made of."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from qat_export.graphs.builder import OPSET
from qat_export.graphs.metadata import InputKind
from qat_export.graphs.portable import emit_portable
from qat_export.integer.network import ALWAYS, NEVER, IntegerNetwork
from qat_export.integer.reference import Interpreter
from qat_export.verify.exactness import check_exactness

from qat.data.augment import normalize
from qat.models.bnext import BNext
from tests.helpers.cases import combinations, exhaustive, slow
from tests.helpers.networks import (
    float_network,
    lowered,
    make_extreme,
    ordinary,
    parity_problems,
    pixels,
    prepared,
    quantization,
    shrink_grids,
    torch_problems,
    toy,
)
from tests.helpers.paths import ROOT

#: Two of three blocks: for claims about numbers, not about how blocks are put together.
FEW_WIDTHS = (8, 8, 16)


def assert_parity(torch_model: BNext, size: int, *, seed: int = 9) -> IntegerNetwork:
    """torch evaluating = interpreter = onnxruntime, for one image and five; returns the lowered network."""
    network = lowered(torch_model)
    images = pixels(seed, 5, size)
    # Both batches in one comparison: preparing the sessions takes most of its time.
    result = check_exactness(emit_portable(network, size), network, images, batches=(1, 5))
    assert result.missing == ()
    assert [tensor for tensor in result.tensors if tensor.different] == []
    # Sub-blocks alone too, once: their result does not depend on the images.
    assert list(torch_problems(torch_model, network, images.numpy(), sub_blocks=True)) == []
    assert list(torch_problems(torch_model, network, images[:1].numpy())) == []
    return network


# Parity with the interpreter.


@pytest.mark.parametrize("examples", [10, exhaustive(40)])
def test_torch_interpreter_and_graph_are_equal_on_random_networks(examples: int) -> None:
    # Shrinking would rebuild networks for minutes; an example is printed as drawn.
    settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(st.data())(equal_on_a_random_network))()


def equal_on_a_random_network(data: st.DataObject) -> None:
    def draw(strategy: st.SearchStrategy[Any]) -> Any:
        return data.draw(strategy)

    bits = st.integers(2, 8)
    size = draw(st.sampled_from([1, 2, 3, 7, 9, 12, 15, 16, 17]))
    seed = draw(st.integers(0, 10_000))
    model = float_network(
        seed,
        widths=draw(st.sampled_from([(3, 3, 6), (8, 16, 16, 32), (5, 10, 10), (16, 16, 32, 32), (1, 2, 4)])),
        stem_stride=draw(st.sampled_from([1, 2])),
        elm_attention=draw(st.booleans()),
        infor_recoupling=draw(st.booleans()),
        num_classes=draw(st.sampled_from([1, 2, 10])),
    )
    extreme = draw(st.sampled_from(["before calibration", "after calibration", "never"]))
    if extreme == "before calibration":
        make_extreme(model, seed)
    points = ("trunk", "se", "classifier", "se_weight", "stem_weight", "fc_weight")
    prepared(model, quantization(**{point: draw(bits) for point in points}), seed=seed)
    if extreme == "after calibration":
        make_extreme(model, seed)
    assert_parity(model, size, seed=seed)


@combinations({"stem_stride": [1, 2], "infor_recoupling": [True, False], "elm_attention": [True, False]})
def test_every_architecture_equals_the_interpreter_at_8_bits(
    elm_attention: bool, infor_recoupling: bool, stem_stride: int
) -> None:
    model = toy(1, elm_attention=elm_attention, infor_recoupling=infor_recoupling, stem_stride=stem_stride)
    assert_parity(model, 17)


@pytest.mark.parametrize("size", [1, slow(2), exhaustive(9), 15, exhaustive(16), slow(17), exhaustive(33)])
def test_the_graph_equals_the_interpreter_at_other_image_sizes_than_the_network_was_trained_at(
    size: int,
) -> None:
    assert_parity(ordinary()[0], size)


@pytest.mark.parametrize("trunk", [2, slow(3), exhaustive(4), exhaustive(6), slow(5), slow(7), 8])
def test_the_graph_equals_the_interpreter_for_every_width_of_the_activations(trunk: int) -> None:
    bits = quantization(trunk=trunk, se=10 - trunk, classifier=trunk, se_weight=trunk, stem_weight=10 - trunk)
    assert_parity(toy(2, bits, widths=FEW_WIDTHS), 15)


@combinations({"when": ["before", "after"], "seed": [0, 1, *map(exhaustive, (2, 3, 4)), 5]})
def test_extreme_parameters_keep_the_parity(seed: int, when: str) -> None:
    model = float_network(seed, widths=FEW_WIDTHS)
    if when == "before":
        make_extreme(model, seed)
    prepared(model, seed=seed)
    if when == "after":
        make_extreme(model, seed)
    assert_parity(model, 9)


@combinations(
    {
        "points": [(".y", ".branch"), ("trunk", "trunk_mid", "trunk_out"), (".product",), (".logits",)],
        "factor": [1e-7, exhaustive(1e-3), exhaustive(1e3), 1e7],
    }
)
def test_grids_of_very_different_scales_keep_the_parity(factor: float, points: tuple[str, ...]) -> None:
    model = toy(3, widths=FEW_WIDTHS)
    shrink_grids(model, factor, points)
    assert_parity(model, 9)


def test_moves_beyond_every_trunk_value_keep_the_parity() -> None:
    model = toy(4)
    spatial, pointwise = model.feature[1].Attention, model.feature[1].FFN_1
    with torch.no_grad():
        spatial.move.bias[:, ::2] = 1e9
        pointwise.move.bias.fill_(-1e9)
    network = assert_parity(model, 9)
    assert set(network.blocks[0].spatial.conv.threshold[::2]) == {ALWAYS}
    assert set(network.blocks[0].pointwise[0].conv.threshold) == {NEVER}


@pytest.mark.parametrize(
    "slopes",
    [(0.0,), slow((1.0,)), slow((-1.0, -0.5)), slow((1.5, 0.1)), (-4.0, 4.0), (100.0, 1e-6), slow((1e-9,))],
)
def test_prelu_slopes_of_every_kind_keep_the_parity(slopes: tuple[float, ...]) -> None:
    model = float_network(5, widths=FEW_WIDTHS)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.PReLU):
                module.weight.copy_(
                    torch.tensor(slopes).repeat(module.num_parameters)[: module.num_parameters]
                )
    assert_parity(prepared(model), 9)


def test_rows_of_zeros_in_attention_and_classifier_keep_the_parity_and_their_bias() -> None:
    model = toy(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".se." in name and name.endswith("weight"):
                parameter[0] = 0
        model.fc.weight[3] = 0
        model.fc.bias[3] = 5.0
    network = assert_parity(model, 9)
    logits = Interpreter(network)(pixels(0, 4, 9).numpy())
    np.testing.assert_allclose(logits[:, 3], 5.0, rtol=1e-6)


def test_images_outside_of_the_pixel_range_saturate_alike() -> None:
    torch_model, network, model = ordinary()
    images = (40 * torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).numpy()
    assert list(parity_problems(network, model, images)) == []
    assert list(torch_problems(torch_model, network, images)) == []


@pytest.mark.parametrize("channels", [0, 10_000])
def test_vectors_repeated_along_the_width_or_not_compute_the_same(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qat_export.graphs.storage.REPEATED_CHANNELS", channels)
    network = ordinary()[1]
    model = emit_portable(network, 15)
    assert ("Tile" in {node.op_type for node in model.graph.node}) == bool(channels)
    assert list(parity_problems(network, model, pixels(3, 2, 15).numpy())) == []


# Input.


@combinations({"kind": ["uint8 NCHW", "uint8 NHWC"], "strict": [False, True]})
def test_a_model_of_raw_pixels_gives_the_logits_of_the_float_one(kind: InputKind, strict: bool) -> None:
    _, network, model = ordinary()
    raw = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16)).astype(np.uint8)
    raw.reshape(4, 3, 256)[:, :] = np.arange(256)  # every value in every channel
    raw[1:] = np.random.default_rng(0).permuted(raw[1:], axis=2)
    images = normalize(torch.from_numpy(raw), network.mean, network.std).numpy()
    pixel_model = emit_portable(network, input_kind=kind, strict=strict)
    (value,) = pixel_model.graph.input
    fed = raw if kind == "uint8 NCHW" else raw.transpose(0, 2, 3, 1)
    dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
    assert dims == ["batch", *fed.shape[1:]]
    assert value.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert {e.key: e.value for e in pixel_model.metadata_props}["input"] == kind
    for optimize in (False, True):
        expected, found = (
            run(m, x, optimize=optimize)
            for m, x in ((model, images), (pixel_model, np.ascontiguousarray(fed)))
        )
        assert found.tobytes() == expected.tobytes()


def run(model: onnx.ModelProto, images: np.ndarray[Any, Any], *, optimize: bool) -> np.ndarray[Any, Any]:
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": images})[0])


def test_the_parity_check_sees_a_difference_of_one_step() -> None:
    _, network, model = ordinary()
    bias = network.stem.conv.bias.copy()
    bias[0] += round(1 / float(network.stem.conv.multiplier[0]))
    wrong = replace(network, stem=replace(network.stem, conv=replace(network.stem.conv, bias=bias)))
    problems = list(parity_problems(wrong, model, pixels(0, 2, 16).numpy()))
    assert any("feature.0/trunk" in problem for problem in problems)


# What the graph is made of.


def test_the_model_passes_the_full_check_and_uses_standard_operators_only() -> None:
    model = ordinary()[2]
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0


def test_input_and_output_have_a_dynamic_batch_and_the_network_s_shapes() -> None:
    _, network, model = ordinary()

    def shape(value: onnx.ValueInfoProto) -> list[object]:
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, shape(image)) == ("image", ["batch", 3, 16, 16])
    assert (logits.name, shape(logits)) == ("logits", ["batch", 10])
    assert {v.type.tensor_type.elem_type for v in (image, logits)} == {onnx.TensorProto.FLOAT}
    assert shape(emit_portable(network, 24).graph.input[0]) == ["batch", 3, 24, 24]


def test_emitting_twice_gives_the_same_bytes() -> None:
    network = ordinary()[1]
    first, second = (emit_portable(network).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_fresh_processes_with_other_hash_seeds_emit_the_same_bytes(tmp_path: Path) -> None:
    network = ordinary()[1]
    (tmp_path / "network.pickle").write_bytes(pickle.dumps(network))
    script = (
        "import pickle, sys; from pathlib import Path; from qat_export.graphs.portable import emit_portable\n"
        "network = pickle.loads(Path(sys.argv[1], 'network.pickle').read_bytes())\n"
        "content = emit_portable(network).SerializeToString(deterministic=True)\n"
        "Path(sys.argv[1], 'model.onnx').write_bytes(content)\n"
        "assert 'torch' not in sys.modules"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], check=True, env=environment, cwd=tmp_path
        )
        written = (tmp_path / "model.onnx").read_bytes()
        assert written == emit_portable(network).SerializeToString(deterministic=True)


def evaluated(model: onnx.ModelProto, output: str) -> np.ndarray[Any, Any]:
    """Value of a tensor that depends on initializers alone."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    needed, nodes = {output}, []
    for node in reversed(model.graph.node):
        if set(node.output) & needed:
            needed |= set(node.input)
            nodes.append(node)
    assert "image" not in needed
    del part.graph.node[:], part.graph.input[:], part.graph.output[:], part.graph.value_info[:]
    part.graph.node.extend(reversed(nodes))
    part.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.INT8, None))
    unused = [tensor for tensor in part.graph.initializer if tensor.name not in needed]
    for tensor in unused:
        part.graph.initializer.remove(tensor)
    session = ort.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {})[0])


@pytest.mark.parametrize("widths", [(8, 16, 16, 32), (3, 3, 6)])
def test_binary_weights_unpack_to_the_signs_of_the_latent_weights_exactly(widths: tuple[int, ...]) -> None:
    torch_model = toy(7, widths=widths)
    network = lowered(torch_model)
    model = emit_portable(network)
    for sub in network.sub_blocks():
        weight = evaluated(model, f"{sub.name}/binary_weight")
        assert weight.dtype == np.int8
        assert set(np.unique(weight)) <= {-1, 1}
        module = torch_model.get_submodule(sub.name)
        flipped = module.norm1.weight.detach().numpy() < 0
        latent = np.where(module.binary_conv.weight.detach().numpy() >= 0, 1, -1)
        expected = np.where(flipped[:, None, None, None], -latent, latent)
        np.testing.assert_array_equal(weight, expected)


def test_a_weight_of_a_binary_convolution_takes_one_bit_in_the_file() -> None:
    network = lowered(toy(8, widths=(64, 128), size=8), size=8)
    model = emit_portable(network)
    weights = sum(int(np.prod(sub.conv.shape)) for sub in network.sub_blocks())
    bits = [t for t in model.graph.initializer if t.name.endswith("/binary_weight.bits")]
    assert sum(len(t.raw_data) for t in bits) == weights // 8
    # The rest is names, int8 weights and a few vectors per layer.
    integers = sum(affine.weight.size for affine in network.affines())
    assert len(model.SerializeToString()) < weights / 8 + integers + 60_000
    largest = max((t for t in model.graph.initializer if t not in bits), key=lambda t: len(t.raw_data))
    assert len(largest.raw_data) <= integers


def optimized(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(str(path))


def test_after_fusion_no_image_shaped_tensor_is_float(tmp_path: Path) -> None:
    _, network, model = ordinary()
    fused = optimized(model, tmp_path / "fused.onnx")
    operators = Counter(node.op_type for node in fused.graph.node)
    produced = [output for node in fused.graph.node for output in node.output]
    probe = onnx.ModelProto()
    probe.CopyFrom(fused)
    for name in produced:
        if name != "logits":
            probe.graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    values = dict(zip(names, session.run(None, {"image": pixels(0, 1, 16).numpy()}), strict=True))
    floats = {name: value.shape for name, value in values.items() if value.dtype == np.float32}
    large = {name: shape for name, shape in floats.items() if np.prod(shape) > max(shape)}
    assert large == {}
    assert set(operators) & {"PRelu", "Conv", "GlobalAveragePool", "AveragePool", "Mul", "Where"} <= {"Mul"}
    subs = list(network.sub_blocks())
    pooled = sum(sub.conv.stride == 2 for sub in subs)
    # The stem; a binary convolution and two of its attention; the mean of 2×2.
    assert operators["QLinearConv"] == 1 + 3 * len(subs) + pooled
    # Of floats only vectors are multiplied, and only sums are converted.
    assert operators["Mul"] == len(subs)
    assert operators["DequantizeLinear"] == 2 * len(subs) + 2
    # Two means, their sum, the attention and its gain; the last mean and the logits.
    assert len(floats) == 5 * len(subs) + 2


def test_after_fusion_only_the_image_is_transposed(tmp_path: Path) -> None:
    fused = optimized(ordinary()[2], tmp_path / "fused.onnx")
    transposed = [node.input[0] for node in fused.graph.node if node.op_type == "Transpose"]
    assert transposed == ["image/uint8"]


def test_unpacking_the_weights_costs_nothing_after_loading(tmp_path: Path) -> None:
    _, network, model = ordinary()
    fused = optimized(model, tmp_path / "fused.onnx")
    weights = {f"{sub.name}/binary_weight" for sub in network.sub_blocks()}
    assert not weights & {output for node in fused.graph.node for output in node.output}


def test_metadata_are_complete_and_parse_as_json() -> None:
    _, network, model = ordinary()
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["format"] == "bnext-qat portable 1"
    assert metadata["architecture"] == network.architecture
    assert metadata["run"] == "a test"
    assert json.loads(metadata["image_size"]) == 16
    assert json.loads(metadata["class_names"]) == [str(i) for i in range(10)]
    normalization = json.loads(metadata["normalization"])
    assert normalization == {"mean": list(network.mean), "std": list(network.std)}
    grids = json.loads(metadata["grids"])
    assert set(grids) == set(network.grids)
    for name, grid in network.grids.items():
        expected = {
            "scale": grid.scale,
            "bits": grid.bits,
            "signed": grid.signed,
            "zero_point": grid.zero_point,
        }
        assert grids[name] == expected


def test_the_metadata_name_the_image_size_of_the_export() -> None:
    metadata = {entry.key: entry.value for entry in emit_portable(ordinary()[1], 24).metadata_props}
    assert metadata["image_size"] == "24"


def test_nodes_and_tensors_carry_the_names_of_the_modules_they_came_from() -> None:
    torch_model, network, model = ordinary()
    modules = dict(torch_model.named_modules())
    names = [node.name for node in model.graph.node if node.name]
    assert len(set(names)) == len(names)
    assert {node.op_type for node in model.graph.node if node.name} >= {"QLinearConv", "Mul", "Add", "Max"}
    allowed = {*modules, "head", "image", "logits"}
    assert {name.split("/")[0] for name in names} <= allowed
    produced = {output for node in model.graph.node for output in node.output}
    assert set(network.grids) - {"image"} <= produced
    for sub in network.sub_blocks():
        assert any(name.startswith(f"{sub.name}/") for name in names)
