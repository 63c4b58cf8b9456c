"""Exported models against the reference, integer for integer; what is seen, and what is refused."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from qat_export.graphs.portable import emit_portable
from qat_export.integer.network import BinaryConv, IntegerNetwork, SubBlock
from qat_export.integer.reference import Interpreter, convolve, signs
from qat_export.verify import exactness as module
from qat_export.verify.exactness import check_exactness, sample
from qat_export.verify.figures import HEADINGS, Exactness
from qat_export.verify.model import input_array, open_session
from qat_export.verify.probes import sub_block_inputs, tensor_names, with_outputs, with_sums
from torch import Tensor

from qat.data.loading import load_split
from qat.data.split import MemorySplit
from qat.errors import CheckpointError, DataError, QatError, VerificationError
from qat.quantize.dyadic import ACCUMULATOR_UNIT
from qat.recipe.schema import Data
from tests.helpers.cases import fast_where, slow
from tests.helpers.cifar10 import cifar10
from tests.helpers.networks import MEAN, STD, lowered, make_extreme, ordinary, pixels, saved, toy, with_conv

LEVELS = [
    *(
        "constants",
        "image",
        "stem",
        "binary sums",
        "binary convolutions",
        "PReLU",
        "2×2 means",
        "attention vectors",
    ),
    *("branch", "trunk", "head", "logits"),
]


def random(count: int = 32, size: int = 16) -> Tensor:
    """Raw pixels without any structure."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def digits(count: int = 32) -> Tensor:
    return next(iter(load_split(Data(dataset="digits", image_size=16), "test").batches(count)))[0]


@functools.cache
def small() -> tuple[IntegerNetwork, onnx.ModelProto]:
    """A network of one block with three sub-blocks: not to be changed."""
    network = lowered(toy(1, widths=(8, 16)))
    return network, emit_portable(network)


# A fresh export.


TARGETS = {
    "float input": {},
    "pixels": {"input_kind": "uint8 NCHW"},
    "pixels, channels last": {"input_kind": "uint8 NHWC"},
    "strict": {"strict": True},
}


def assert_exact(target: str, images: Tensor) -> Exactness:
    network = ordinary()[1]
    model = emit_portable(network, images.shape[-1], **TARGETS[target])
    result = check_exactness(model, network, images, batches=(1, 32))
    assert (result.missing, result.problems()) == ((), [])
    assert {(tensor.different, tensor.largest) for tensor in result.tensors} == {(0, 0.0)}
    result.require()
    return result


@pytest.mark.parametrize("target", fast_where(["float input", "strict"], TARGETS))
def test_every_element_of_a_fresh_export_equals_the_reference_on_noise_and_digits(target: str) -> None:
    result = assert_exact(target, torch.cat([random(16), digits(16)]))
    assert (result.images, result.batches, result.logit_batches) == (32, (1, 32), (1, 32))
    found = {(level.name, level.optimizations): level for level in result.levels()}
    settings = {(name, setting) for name in LEVELS[1:] for setting in ("off", "on")}
    assert set(found) == settings | {("constants", "none"), ("logits", "on, logits alone")}
    assert {level.share for level in found.values()} == {"100 %"}
    # All images at once, and four of them alone.
    assert found["logits", "off"].elements == (32 + 4) * 10
    assert found["image", "on"].elements == (32 + 4) * 3 * 16**2


@pytest.mark.parametrize("target", ["pixels", pytest.param("float input", marks=pytest.mark.exhaustive)])
def test_every_element_of_a_fresh_export_equals_the_reference_on_photographs(target: str) -> None:
    assert assert_exact(target, cifar10(32).images).images == 32


@pytest.mark.parametrize("options", [{"elm_attention": False}, slow({"infor_recoupling": False})], ids=str)
def test_an_ablated_network_is_exact_too(options: dict[str, bool]) -> None:
    network = lowered(toy(4, **options))
    assert check_exactness(emit_portable(network), network, random(8)).problems() == []


def test_extreme_parameters_and_images_out_of_range_stay_exact() -> None:
    model = toy(3)
    make_extreme(model, 3)
    network = lowered(model)
    images = 40 * torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert check_exactness(emit_portable(network), network, images, batches=(2, 6)).problems() == []


def test_every_named_tensor_of_the_network_is_compared() -> None:
    network, model = ordinary()[1:]
    result = check_exactness(model, network, random(2))
    compared = {tensor.name for tensor in result.tensors if tensor.optimizations == "on"}
    sums = {f"{sub.name}/sum" for sub in network.sub_blocks()}
    assert compared == {*network.grids, *sums, "logits"}


def test_a_tensor_that_the_model_lacks_is_a_problem() -> None:
    network, model = ordinary()[1:]
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    for node in renamed.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("feature.2/trunk_mid", "feature.2/other") for name in names]
    result = check_exactness(renamed, network, random(2))
    pointwise = [sub.name for sub in network.blocks[1].pointwise]
    assert result.missing == ("feature.2/trunk_mid", *(f"{name}/sum" for name in pointwise))
    assert result.problems()[0] == "the model has no tensor 'feature.2/trunk_mid'"


def test_large_images_are_compared_in_slices_and_logits_in_full_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, model = ordinary()[1:]
    monkeypatch.setattr(module, "SLICE_PIXELS", 2 * 16**2)
    result = check_exactness(model, network, random(5), batches=(1, 8))
    assert (result.problems(), result.batches, result.logit_batches) == ([], (1, 2), (1, 8))
    found = {(level.name, level.optimizations): level.elements for level in result.levels()}
    assert found["logits", "off"] == (2 + 5) * 10
    assert found["logits", "on, logits alone"] == (4 + 8) * 10
    assert result.title.endswith("in batches of 1 and 2; logits alone also of 8")


# The sums inside QLinearConv.


def accumulators(model: onnx.ModelProto, sub: SubBlock, fed: NDArray[Any], optimize: bool) -> NDArray[Any]:
    """Sums of products that the graph's own QLinearConv of ``sub`` accumulates, read out of the operator.

    The node is repeated with a multiplier of one step per product and a bias that moves another window of
    254 values into uint8's range; each sum is inside of exactly one window.
    """
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    producers = {output: node for node in extended.graph.node for output in node.output}
    node = producers[f"{sub.name}/conv"]
    node = node if node.op_type == "QLinearConv" else producers[node.input[0]]
    assert node.op_type == "QLinearConv"
    reach = sub.conv.kernel_size**2 * sub.conv.channels
    lows = list(range(-reach - 1, reach + 1, 254))

    def constant(name: str, value: NDArray[Any]) -> str:
        extended.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        return name

    step = constant("probe/step", np.full(sub.conv.channels, 1 / ACCUMULATOR_UNIT, np.float32))
    zero = constant("probe/zero", np.array(0, np.uint8))
    for low in lows:
        bias = constant(f"probe/bias{low}", np.full(sub.conv.channels, -low * ACCUMULATOR_UNIT, np.int32))
        probe = extended.graph.node.add()
        probe.CopyFrom(node)
        probe.name = f"probe/{low}"
        probe.input[4], probe.input[7], probe.input[8] = step, zero, bias
        probe.output[0] = probe.name
        extended.graph.output.append(onnx.ValueInfoProto(name=probe.name))
    session = open_session(extended.SerializeToString(), "probe", optimize=optimize)
    windows = np.stack(session.run([f"probe/{low}" for low in lows], {"image": fed})).astype(np.int32)
    inside = (windows > 0) & (windows < 255)
    assert (inside.sum(0) == 1).all()
    return (inside * (windows + np.array(lows).reshape(-1, 1, 1, 1, 1))).sum(0)


@pytest.mark.parametrize("widths", [(8, 8, 16), slow((5, 10, 10)), slow((64, 128))])
def test_the_sums_inside_the_graph_s_own_operators_equal_the_reference_integer_for_integer(
    widths: tuple[int, ...],
) -> None:
    network = lowered(toy(2, widths=widths))
    model = emit_portable(network)
    images = pixels(3, 2, 16)
    interpreter = Interpreter(network)
    interpreter(images.numpy())
    for sub, trunk in sub_block_inputs(network):
        signed = signs(interpreter.tensors[trunk], sub.conv)
        expected = convolve(signed, sub.conv.weight(), sub.conv.stride)
        assert len(np.unique(expected)) > 3
        for optimize in (False, True):
            found = accumulators(model, sub, input_array(images, "float32 NCHW"), optimize)
            np.testing.assert_array_equal(found, expected, err_msg=f"{sub.name}, optimize={optimize}")


def test_further_outputs_leave_every_fused_operator_in_place(tmp_path: Path) -> None:
    """What runs with all tensors as outputs is what runs without, but for transpositions and the sums."""

    def operators(model: onnx.ModelProto) -> Counter[str]:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / "m.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)

    network, model = ordinary()[1:]
    extended, sums = with_sums(model, network)
    alone = operators(model)
    together = operators(with_outputs(extended, [*tensor_names(model, network).values(), *sums.values()]))
    assert alone - together == Counter()
    assert set(together - alone) == {"Transpose", "ConvInteger"}
    assert {"QLinearConv", "QLinearAdd", "QLinearMul"} <= set(alone)


# What is seen.


def flipped(conv: BinaryConv, bit: int) -> NDArray[np.uint8]:
    """Sign bits with one of them inverted."""
    bits = conv.sign_bits.copy()
    bits[bit // 8] ^= 128 >> bit % 8
    return bits


def test_one_flipped_sign_bit_is_seen_in_each_convolution_and_named() -> None:
    """Sums are compared given the trunk that the graph computed: each shows its own convolution's bit."""
    network = wrong = ordinary()[1]
    for seed, sub in enumerate(network.sub_blocks()):
        bit = int(np.random.default_rng(seed).integers(np.prod(sub.conv.shape)))
        wrong = with_conv(wrong, sub.name, sign_bits=flipped(sub.conv, bit))
    result = check_exactness(emit_portable(wrong), network, random(4))
    sums = {tensor.name: tensor.largest for tensor in result.tensors if tensor.name.endswith("/sum")}
    assert sums == {f"{sub.name}/sum": 2 * ACCUMULATOR_UNIT for sub in network.sub_blocks()}


def constant(result: Exactness) -> str:
    """Name of the one constant that differs."""
    (name,) = [t.name for t in result.tensors if t.optimizations == "none" and t.different]
    return name


@pytest.mark.parametrize("target", ["float input", "strict"])
def test_the_sums_of_convolutions_behind_a_flipped_sign_bit_are_not_blamed(target: str) -> None:
    network = small()[0]
    sub = network.blocks[0].spatial
    wrong = emit_portable(with_conv(network, sub.name, sign_bits=flipped(sub.conv, 5)), **TARGETS[target])
    result = check_exactness(wrong, network, random(4))
    assert {t.name for t in result.tensors if t.name.endswith("/sum") and t.different} == {f"{sub.name}/sum"}
    with pytest.raises(VerificationError, match=rf"binary sums.* in {sub.name}/sum; none may"):
        result.require()
    assert constant(result).startswith(sub.name)


def test_a_flipped_sign_bit_that_changes_no_result_is_seen_too() -> None:
    network = small()[0]
    sub = network.blocks[0].spatial
    multiplier = sub.conv.multiplier.copy()
    multiplier[0] = 2.0**-22  # channel 0 is a constant
    network = with_conv(network, sub.name, multiplier=multiplier)
    wrong = with_conv(network, sub.name, sign_bits=flipped(network.blocks[0].spatial.conv, 3))
    result = check_exactness(emit_portable(wrong), network, random(4))
    different = {tensor.name for tensor in result.tensors if tensor.different}
    assert different - {f"{sub.name}/sum"} == {constant(result)}
    assert len(result.problems()) == 3  # the constant, and the sums with optimizations off and on


def off_by_one(network: IntegerNetwork, kind: str) -> tuple[IntegerNetwork, str]:
    """The network with one constant off by one step, and the tensor where that shows first."""
    sub = network.blocks[0].spatial
    head = network.head
    match kind:
        case "stem bias":
            conv = network.stem.conv
            bias = conv.bias.copy()
            bias[0] += round(1 / float(conv.multiplier[0]))
            return replace(network, stem=replace(network.stem, conv=replace(conv, bias=bias))), (
                "feature.0/trunk"
            )
        case "stem weight":
            weight = network.stem.conv.weight.copy()
            weight[1, 0, 1, 1] += 1 if weight[1, 0, 1, 1] < 127 else -1
            conv = replace(network.stem.conv, weight=weight)
            return replace(network, stem=replace(network.stem, conv=conv)), "feature.0/trunk"
        case "threshold":
            return with_conv(network, sub.name, threshold=sub.conv.threshold + 1), f"{sub.name}/sum"
        case "binary bias":
            bias = sub.conv.bias.copy()
            bias[2] += round(1 / float(sub.conv.multiplier[2]))
            return with_conv(network, sub.name, bias=bias), f"{sub.name}/conv"
        case "slope":
            slopes = replace(sub.slopes, integers=sub.slopes.integers - np.int8(1))
            new, shows = replace(sub, slopes=slopes), f"{sub.name}/y"
        case "attention table":
            assert sub.attention is not None
            table = sub.attention.table.copy()
            table += np.where(table < 255, 1, -1).astype(np.uint8)
            new = replace(sub, attention=replace(sub.attention, table=table))
            shows = f"{sub.name}/attention"
        case "offset":
            assert sub.branch is not None
            offset = sub.branch.offset.copy()
            offset[0] += 1
            new = replace(sub, branch=replace(sub.branch, offset=offset))
            shows = f"{sub.name}/normalized"
        case "classifier bias":
            bias = head.classifier.bias.copy()
            bias[9] += 1
            classifier = replace(head.classifier, bias=bias)
            return replace(network, head=replace(head, classifier=classifier)), "logits"
        case _:
            raise AssertionError(kind)
    blocks = (replace(network.blocks[0], spatial=new), *network.blocks[1:])
    return replace(network, blocks=blocks), shows


@pytest.mark.parametrize(
    "kind",
    [
        "threshold",
        "slope",
        "attention table",
        *map(slow, ("stem bias", "stem weight", "binary bias", "offset", "classifier bias")),
    ],
)
def test_a_constant_off_by_one_step_is_seen_and_the_first_wrong_tensor_named(kind: str) -> None:
    network = small()[0]
    wrong, shows = off_by_one(network, kind)
    result = check_exactness(emit_portable(wrong), network, random(8))
    assert result.problems()
    with pytest.raises(VerificationError, match="the exported model is not exact: "):
        result.require()
    names = [name for name in [f"{s.name}/sum" for s in network.sub_blocks()] if name == shows]
    order = [*names, *network.grids, "logits"]
    for setting in ("off", "on"):
        different = {t.name for t in result.tensors if t.different and t.optimizations == setting}
        assert next(name for name in order if name in different) == shows


def test_the_table_shows_share_and_difference_and_the_lines_below_the_tensor() -> None:
    network = ordinary()[1]
    wrong, shows = off_by_one(network, "stem bias")
    result = check_exactness(emit_portable(wrong), network, random(8))
    rows = {row[0]: row for row in result.rows()}
    assert list(rows) == [*LEVELS, "logits alone"]
    assert {len(row) for row in rows.values()} == {len(HEADINGS)}
    assert rows["image"][2:] == ("100 %", "100 %", "0")
    assert rows["stem"][2] == rows["stem"][3] != "100 %"
    assert rows["stem"][4] == "1"
    assert f"stem: by up to 1 in {shows}" in result.worst()
    assert not any(line.startswith("image: ") for line in result.worst())
    assert rows["logits alone"][2] == ""


def test_the_json_form_has_the_same_figures() -> None:
    network = small()[0]
    result = check_exactness(emit_portable(off_by_one(network, "stem bias")[0]), network, random(8))
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (content["images"], content["batches"], content["logit_batches"]) == (8, [1, 8], [1, 32])
    stem = next(level for level in content["levels"] if level["level"] == "stem")
    assert (stem["optimizations"], stem["largest_difference"]) == ("off", 1.0)
    assert 0 < stem["different"] < stem["elements"]
    assert stem["worst_tensor"] == "feature.0/trunk"
    assert content["problems"] == result.problems()
    image = next(level for level in content["levels"] if level["level"] == "image")
    assert (image["different"], image["worst_tensor"]) == (0, None)


# What is refused.


def edited(model: onnx.ModelProto, **changes: str | None) -> onnx.ModelProto:
    """``model`` with metadata changed, or without them where ``None``."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    metadata = {entry.key: entry.value for entry in model.metadata_props} | changes
    del copy.metadata_props[:]
    onnx.helper.set_model_props(copy, {k: v for k, v in metadata.items() if v is not None})
    return copy


def test_a_file_is_checked_as_a_model_in_memory_is(tmp_path: Path) -> None:
    network, model = small()
    in_memory = check_exactness(model, network, random(3))
    assert check_exactness(saved(model, tmp_path / "m.onnx"), network, random(3)) == in_memory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "bnext-qat float32 1"}, r"a float export \('bnext-qat float32 1'\) has no integers"),
        ({"grids": None}, "metadata 'grids' is missing or damaged"),
        ({"grids": "[1]"}, "metadata 'grids' is missing or damaged"),
        ({"grids": '{"image": {"scale": 1}}'}, "metadata 'grids' is missing or damaged"),
        ({"grids": "{}"}, "another network: its grid of 'image' is None, the given network's Grid"),
        ({"normalization": "{}"}, "metadata 'normalization' is missing or damaged"),
        ({"normalization": '{"mean": [0, 0, 0], "std": [1, 1, 1]}'}, r"its mean is \(0.0, 0.0, 0.0\)"),
        ({"architecture": "BNext-Huge"}, "its architecture is BNext-Huge, the given network's"),
        ({"input": "int4 NHWC"}, "metadata 'input' is 'int4 NHWC', allowed: 'float32 NCHW', "),
    ],
)
def test_a_model_that_is_not_of_this_network_is_refused_naming_file_and_cause(
    changes: dict[str, str | None], message: str, tmp_path: Path
) -> None:
    network, model = small()
    path = saved(edited(model, **changes), tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match=message) as caught:
        check_exactness(path, network, random(2))
    assert str(caught.value).startswith(f"{path}: ")


def test_a_model_of_other_weights_is_refused_by_its_grids(tmp_path: Path) -> None:
    path = saved(emit_portable(lowered(toy(50, widths=(8, 16)))), tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match=r"another network: its grid of '.*' is Grid\(scale="):
        check_exactness(path, small()[0], random(2))


def test_images_of_another_size_are_refused() -> None:
    network, model = small()
    with pytest.raises(DataError, match="takes 3×16×16 images, given 3×8×8"):
        check_exactness(model, network, random(2, size=8))
    with pytest.raises(DataError, match="takes 3×16×16 images, given 3×32×32"):
        check_exactness(emit_portable(network, input_kind="uint8 NHWC"), network, random(2, size=32))


def test_normalized_images_are_no_pixels() -> None:
    network = small()[0]
    with pytest.raises(ValueError, match=r"'uint8 NCHW' was given torch\.float32 images"):
        check_exactness(emit_portable(network, input_kind="uint8 NCHW"), network, pixels(0, 2, 16))


@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_file_ends_in_an_error_of_ours_or_in_a_problem(seed: int, tmp_path: Path) -> None:
    network, model = small()
    content = bytearray(model.SerializeToString())
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, len(content), 40):
        content[place] ^= int(rng.integers(1, 256))
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    message = ""
    try:
        problems = check_exactness(path, network, random(2), batches=(2,)).problems()
    except QatError as error:
        message = str(error)
    assert message.startswith(f"{path}: ") or problems
    assert "\n" not in message


# Images to compare with.


def test_a_sample_is_half_of_the_split_and_half_noise_and_the_same_every_time() -> None:
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 16, 16)
    split = MemorySplit([str(i) for i in range(10)], images, torch.arange(40) % 10)
    chosen = sample(split, 16)
    assert (chosen.shape, chosen.dtype) == ((32, 3, 16, 16), torch.uint8)
    flat = chosen.flatten(1).float().std(1)
    assert (flat[:16] == 0).all()
    assert len(set(chosen[:16, 0, 0, 0].tolist())) == 16
    assert (flat[16:] > 0).all()
    assert chosen[16:].min() < 20
    assert chosen[16:].max() > 235
    assert torch.equal(chosen, sample(split, 16))
    assert not torch.equal(chosen, sample(split, 16, seed=1))


@pytest.mark.parametrize(("side", "count"), [(8, 32), (32, 32), (64, 8), (224, 2)])
def test_of_large_images_fewer_are_taken(side: int, count: int) -> None:
    images = torch.zeros(40, 1, side, side, dtype=torch.uint8)
    split = MemorySplit(["a", "b"], images, torch.arange(40) % 2)
    assert sample(split, side).shape == (count, 3, side, side)


def test_the_normalization_is_that_of_the_network() -> None:
    """Raw pixels and the images normalized by hand give the same figures."""
    network, model = small()
    images = random(3)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    by_hand = (images.float() / 255 - mean) / std
    wrong = emit_portable(off_by_one(network, "stem bias")[0])
    assert check_exactness(wrong, network, images) == check_exactness(wrong, network, by_hand)
    assert check_exactness(model, network, by_hand).problems() == []
