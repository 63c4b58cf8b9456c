"""The float32 ONNX graph computes what the network without quantization computes; what it is made of.

Signs make a whole network chaotic: where ``x + bias`` is 0 but for rounding, two correct programs may differ
by a whole sign, and all that follows by more. So sub-blocks are compared one at a time, each on the very
trunk that the graph computed, where only rounding is left; the logits of the whole on most images.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from qat_export.graphs.builder import OPSET
from qat_export.graphs.float32 import emit_float
from qat_export.verify.model import OnnxModel
from torch import Tensor, nn

from qat.errors import QuantizationError
from qat.models.bnext import BNext, binary_convolutions, set_temperature
from qat.nn.layers import BinaryActivation, SqueezeExcitation
from qat.nn.sub_block import SubBlock
from qat.quantize.image_grid import image_grid
from qat.quantize.preparation import prepare
from qat.recipe.schema import Group, Quantization, StemGroup, TrunkGroup
from tests.helpers.cases import combinations, slow
from tests.helpers.networks import MEAN, STD, float_network, make_extreme, pixels, quantization, toy
from tests.helpers.paths import ROOT

#: Bound on :func:`difference`. Rounding causes less than 1e-6; the test of wrong constants shows that none of
#: them hides below.
TOLERANCE = 1e-5


def exported(model: BNext, size: int = 16, **options: Any) -> onnx.ModelProto:
    return emit_float(model, image_size=size, mean=MEAN, std=STD, **options)


def quantization_off() -> Quantization:
    off = {"enabled": False}
    return Quantization(
        stem=StemGroup(**off), se=Group(**off), classifier=Group(**off), trunk=TrunkGroup(**off)
    )


def prepared_without_quantization(seed: int = 0, **options: Any) -> BNext:
    model = float_network(seed, **options)
    prepare(model, quantization_off(), image_grid(MEAN, STD))
    return model.eval()


def without_quantization(model: BNext) -> BNext:
    """The float network with the parameters of a prepared one, and its sign of 0."""
    plain = BNext.from_architecture(model.architecture)
    keys = plain.state_dict().keys()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in keys})
    for module in plain.modules():
        if isinstance(module, BinaryActivation):
            module.zero_is_positive = True
    return plain.eval()


def run(
    model: onnx.ModelProto, names: list[str], images: Tensor, *, optimize: bool = True
) -> dict[str, NDArray[np.float32]]:
    """The named tensors of the graph."""
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    for name in names:
        if name != "logits":
            extended.graph.output.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(extended.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"image": images.numpy()}), strict=True))


def steps(model: BNext) -> Iterator[tuple[str, str, nn.Module]]:
    """Input, output and module of every part that is compared alone; the graph's names."""
    yield "image", "feature.0/trunk", model.feature[0]
    x = "feature.0/trunk"
    for index, block in enumerate(list(model.feature)[1:], start=1):
        name = f"feature.{index}"
        yield x, f"{name}/trunk_mid", block.get_submodule(block.spatial_name)
        x = f"{name}/trunk_out"
        for leaf in block.pointwise_names:
            out = x if len(block.pointwise_names) == 1 else f"{name}.{leaf}/out"
            yield f"{name}/trunk_mid", out, block.get_submodule(leaf)
    yield x, "head/input", nn.Sequential(model.prelu, model.pool)
    yield "head/input", "logits", model.fc


def difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest one relative to its channel's largest value, or a tenth of the tensor's if that is more."""
    assert found.shape == expected.shape
    if not np.isfinite(found).all():
        return np.inf
    axes = (0, *range(2, found.ndim))
    scale = np.maximum(np.abs(expected).max(axes), np.abs(expected).max() / 10)
    return float((np.abs(found - expected).max(axes) / scale).max())


def differences(
    torch_model: BNext, model: onnx.ModelProto, images: Tensor, *, optimize: bool = True
) -> dict[str, float]:
    """Difference of every part between torch and the graph, each on the graph's own input."""
    parts = list(steps(torch_model))
    names = list(dict.fromkeys(name for source, out, _ in parts for name in (source, out) if name != "image"))
    tensors = run(model, names, images, optimize=optimize) | {"image": images.numpy()}
    for index, block in enumerate(list(torch_model.feature)[1:], start=1):
        if len(block.pointwise_names) == 2:
            halves = [tensors[f"feature.{index}.{leaf}/out"] for leaf in block.pointwise_names]
            assert np.array_equal(tensors[f"feature.{index}/trunk_out"], np.concatenate(halves, 1))
    with torch.no_grad():
        return {
            out: difference(tensors[out], module(torch.from_numpy(tensors[source])).numpy())
            for source, out, module in parts
        }


def assert_parity(torch_model: BNext, model: onnx.ModelProto, images: Tensor) -> None:
    for optimize in (False, True):
        found = differences(torch_model, model, images, optimize=optimize)
        assert {name: value for name, value in found.items() if not value <= TOLERANCE} == {}


# Parity with the network.


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_every_part_of_a_random_network_equals_torch(data: st.DataObject) -> None:
    def draw(strategy: st.SearchStrategy[Any]) -> Any:
        return data.draw(strategy)

    seed, size = draw(st.integers(0, 10_000)), draw(st.sampled_from([1, 2, 3, 7, 9, 12, 15, 16, 17]))
    model = float_network(
        seed,
        widths=draw(st.sampled_from([(3, 3, 6), (8, 16, 16, 32), (5, 10, 10), (16, 16, 32, 32), (1, 2, 4)])),
        stem_stride=draw(st.sampled_from([1, 2])),
        elm_attention=draw(st.booleans()),
        infor_recoupling=draw(st.booleans()),
        num_classes=draw(st.sampled_from([1, 2, 10])),
    )
    if draw(st.booleans()):
        make_extreme(model, seed)
    if draw(st.booleans()):
        prepare(model, quantization_off(), image_grid(MEAN, STD))
    set_temperature(model, draw(st.sampled_from([1e-8, 0.03])))
    assert_parity(model.eval(), exported(model, size), pixels(seed, 3, size))


@pytest.mark.parametrize("elm_attention", [True, False])
@pytest.mark.parametrize("infor_recoupling", [True, False])
@pytest.mark.parametrize("build", [float_network, prepared_without_quantization])
def test_every_architecture_equals_torch(build: Any, infor_recoupling: bool, elm_attention: bool) -> None:
    model = build(1, elm_attention=elm_attention, infor_recoupling=infor_recoupling)
    assert_parity(model, exported(model), pixels(3, 8, 16))


@combinations({"stem_stride": [1, 2], "size": [1, 2, 7, 9, 15, 33]})
def test_odd_sides_equal_torch(size: int, stem_stride: int) -> None:
    model = float_network(2, widths=(8, 8, 16, 16, 32), stem_stride=stem_stride, elm_attention=size != 9)
    assert_parity(model, exported(model, size), pixels(4, 4, size))


@pytest.mark.parametrize("build", [float_network, prepared_without_quantization])
def test_logits_of_the_whole_network_equal_torch_on_images_without_ties(build: Any) -> None:
    model, images = build(4), pixels(5, 256, 16)
    with torch.no_grad():
        expected = model(images).numpy()
    found = run(exported(model), ["logits"], images)["logits"]
    # A tie needs a value within 1e-6 of 0, in one image of about fifty; a wrong constant changes all of them.
    close = np.abs(found - expected).max(1) < TOLERANCE * np.abs(expected).max()
    assert close.mean() > 0.9
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.97


def test_a_fine_tuned_network_is_exported_without_its_quantizers() -> None:
    model = toy(3)
    plain = without_quantization(model)
    assert exported(model).SerializeToString() == exported(plain).SerializeToString()
    assert_parity(plain, exported(model), pixels(6, 8, 16))


def test_a_network_that_was_never_calibrated_can_be_exported() -> None:
    model = float_network(3)
    prepare(model, quantization(), image_grid(MEAN, STD))
    assert_parity(without_quantization(model), exported(model), pixels(6, 8, 16))


@pytest.mark.parametrize(("build", "zero"), [(float_network, 0.0), (prepared_without_quantization, 1.0)])
def test_the_sign_of_zero_is_that_of_the_network(build: Any, zero: float) -> None:
    model = build(5)
    with torch.no_grad():
        stem, move = model.feature[0], model.feature[1].Attention.move
        stem.conv1.weight.zero_()
        stem.bn1.running_mean.zero_()
        stem.bn1.bias.copy_(torch.arange(8) / 3)
        move.bias.copy_(-stem.bn1.bias.view(1, -1, 1, 1))
        move.bias[:, 1] += 1e-7
        move.bias[:, 2] -= 1e-7
    signs = run(exported(model), ["feature.1.Attention/sign"], pixels(0, 2, 16))["feature.1.Attention/sign"]
    expected = np.full(8, zero, np.float32)
    expected[1:3] = 1, -1
    np.testing.assert_array_equal(signs, np.broadcast_to(expected.reshape(1, -1, 1, 1), signs.shape))
    assert_parity(model, exported(model), pixels(0, 2, 16))


def test_weights_that_are_not_binary_yet_are_exported_as_they_are_used() -> None:
    model = float_network(6)
    set_temperature(model, 0.05)
    stored = initializers(exported(model))
    for name, conv in binary_convolutions(model).items():
        np.testing.assert_array_equal(
            stored[f"{name}.effective_weight"], conv.effective_weight().detach().numpy()
        )
    assert_parity(model, exported(model), pixels(7, 8, 16))


def test_a_network_in_training_mode_is_exported_as_it_evaluates_and_not_changed() -> None:
    model = float_network(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SubBlock):
                module.scale.uniform_(-1.0, 2.0)
                module.binary_conv.weight.mul_(100)  # beyond the clip
    expected = exported(model).SerializeToString()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert exported(model.train()).SerializeToString() == expected
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert_parity(model.eval(), exported(model), pixels(8, 8, 16))


def test_every_constant_that_is_off_by_a_hundredth_is_seen() -> None:
    model = float_network(8, widths=(8, 8, 16))
    for module in model.modules():
        if isinstance(module, SqueezeExcitation):
            module.se[1].bias.detach().fill_(5.0)  # a hidden unit that is dead would hide its weights
    graph, images = exported(model), pixels(9, 16, 16)
    hidden = []
    for index, tensor in enumerate(graph.graph.initializer):
        wrong = onnx.ModelProto()
        wrong.CopyFrom(graph)
        values = onnx.numpy_helper.to_array(tensor)
        changed = onnx.numpy_helper.from_array((values * 1.01 + 0.003).astype(np.float32), tensor.name)
        wrong.graph.initializer[index].CopyFrom(changed)
        if max(differences(model, wrong, images, optimize=False).values()) <= TOLERANCE:
            hidden.append(tensor.name)
    assert hidden == []


# What the graph is made of.


def initializers(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_the_model_passes_the_full_check_and_uses_standard_float_operators_only() -> None:
    for model in (exported(float_network()), exported(prepared_without_quantization())):
        onnx.checker.check_model(model, full_check=True)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        assert {node.domain for node in model.graph.node} == {""}
        assert len(model.functions) == 0
        assert not {node.op_type for node in model.graph.node if "Quantize" in node.op_type}
        assert {value.dtype.name for value in initializers(model).values()} == {"float32"}


def test_binary_weights_are_stored_as_plus_and_minus_one() -> None:
    model = float_network()
    stored = initializers(exported(model))
    for name, conv in binary_convolutions(model).items():
        latent = conv.weight.detach().numpy()
        np.testing.assert_array_equal(stored[f"{name}.effective_weight"], np.where(latent >= 0, 1, -1))


def test_initializers_named_as_in_the_state_dict_hold_its_values() -> None:
    model = float_network()
    state = model.state_dict()
    shared = {name: value for name, value in initializers(exported(model)).items() if name in state}
    assert len(shared) > 0.5 * len(state)
    for name, value in shared.items():
        np.testing.assert_array_equal(value.reshape(-1), state[name].numpy().reshape(-1))


def test_input_and_output_have_a_dynamic_batch_and_the_network_s_shapes() -> None:
    torch_model = float_network()
    model = exported(torch_model, 24)

    def shape(value: onnx.ValueInfoProto) -> list[object]:
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, shape(image)) == ("image", ["batch", 3, 24, 24])
    assert (logits.name, shape(logits)) == ("logits", ["batch", 10])
    assert {v.type.tensor_type.elem_type for v in (image, logits)} == {onnx.TensorProto.FLOAT}
    for batch in (1, 2, 7):
        assert_parity(torch_model, model, pixels(0, batch, 24))


def test_the_file_is_as_large_as_the_network_s_parameters() -> None:
    model = float_network(widths=(64, 128))
    parameters = sum(value.numel() for value in model.parameters())
    assert abs(len(exported(model).SerializeToString()) - 4 * parameters) < 40_000


def test_metadata_are_complete_and_written_as_in_the_integer_exports() -> None:
    model = exported(float_network(), 24, metadata={"run": "a test", "format": "another"})
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata.pop("architecture").startswith("BNext custom [8, 16, 16, 32], 10 classes")
    assert json.loads(metadata.pop("class_names")) == [str(i) for i in range(10)]
    assert json.loads(metadata.pop("normalization")) == {"mean": list(MEAN), "std": list(STD)}
    assert metadata == {
        "format": "bnext-qat float32 1",
        "image_size": "24",
        "input": "float32 NCHW",
        "run": "a test",
    }
    named = exported(float_network(num_classes=2), class_names=("cat", "dog"))
    assert {e.key: e.value for e in named.metadata_props}["class_names"] == '["cat", "dog"]'


def test_the_file_is_accepted_as_an_exported_model(tmp_path: Path) -> None:
    torch_model, images = float_network(), pixels(0, 4, 16)
    onnx.save(exported(torch_model), tmp_path / "float.onnx")
    model = OnnxModel(tmp_path / "float.onnx")
    assert (model.image_size, model.num_classes) == (16, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch_model(images), rtol=1e-4, atol=1e-4)


def test_emitting_again_gives_the_same_bytes_in_a_fresh_process_too(tmp_path: Path) -> None:
    model = float_network()
    expected = exported(model).SerializeToString(deterministic=True)
    assert exported(model).SerializeToString(deterministic=True) == expected
    (tmp_path / "network.pickle").write_bytes(pickle.dumps(model))
    script = (
        "import pickle, sys; from pathlib import Path; from qat_export.graphs.float32 import emit_float\n"
        "network = pickle.loads(Path('network.pickle').read_bytes())\n"
        f"model = emit_float(network, image_size=16, mean={MEAN}, std={STD})\n"
        "Path('model.onnx').write_bytes(model.SerializeToString(deterministic=True))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == expected


# What is refused.


@functools.cache
def shared_network(build: Any) -> BNext:
    model: BNext = build()
    return model


@pytest.mark.parametrize(
    "key",
    [
        "feature.0.conv1.weight",
        "feature.1.Attention.binary_conv.weight",
        "feature.1.Attention.binary_conv.temperature",
        "feature.1.Attention.move.bias",
        "feature.2.Attention.scale",
        "feature.2.FFN.se.se.3.bias",
        "feature.3.FFN_1.norm2.running_mean",
        "feature.3.FFN_1.activation2.weight",
        "fc.bias",
    ],
)
@pytest.mark.parametrize(("value", "named"), [(float("nan"), "NaN"), (float("-inf"), "an infinity")])
@pytest.mark.parametrize("build", [float_network, slow(toy)])
def test_a_value_that_is_not_finite_is_refused_by_the_tensor_s_name(
    key: str, value: float, named: str, build: Any
) -> None:
    model = copy.deepcopy(shared_network(build))
    model.state_dict()[key].view(-1)[-1] = value
    with pytest.raises(QuantizationError, match=rf"^{key}: holds {named}$"):
        exported(model)


def test_a_value_beyond_float32_is_refused() -> None:
    model = float_network().double()
    with torch.no_grad():
        model.fc.weight[0, 0] = 1e300
    with pytest.raises(QuantizationError, match=r"fc\.weight: holds an infinity"):
        exported(model)


def test_a_negative_variance_is_refused() -> None:
    model = float_network()
    model.feature[1].FFN_2.norm1.running_var[3] = -1e-3
    with pytest.raises(QuantizationError, match=r"feature\.1\.FFN_2\.norm1\.running_var: .* negative"):
        exported(model)
