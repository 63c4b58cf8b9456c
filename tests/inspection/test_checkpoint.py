"""Inspection of checkpoints: each format, and every number against a direct computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from qat.checkpoints.format import save_checkpoint
from qat.checkpoints.loading import build
from qat.errors import CheckpointError
from qat.inspection.checkpoint import inspect_checkpoint, open_checkpoint, stored_tensors
from qat.inspection.facts import SIGN_BITS, InspectedLayer, Inspection
from qat.inspection.verdict import verdict
from qat.models.bnext import BNext, binary_convolutions
from qat.quantize.weight_quantizers import WeightQuantizer
from qat.recipe.schema import Quantization, StemGroup
from tests.helpers.checkpoints import (
    WIDTHS,
    calibrated,
    prefixed,
    recipe,
    toy,
    training_checkpoint,
    with_clip_values,
)

CONV = "feature.2.FFN_1"


def inspected(path: Path) -> Inspection:
    checkpoint = open_checkpoint(path)
    return inspect_checkpoint(path, checkpoint, build(checkpoint))


def layers(found: Inspection) -> dict[str, InspectedLayer]:
    return {layer.name: layer for layer in found.layers}


def ours(folder: Path, model: BNext, **options: Any) -> Path:
    save_checkpoint(folder / "ours", model, recipe=recipe(), **options)
    return folder / "ours"


# Formats.


def test_each_format_of_the_authors_is_recognised_by_its_content(tmp_path: Path) -> None:
    model = toy(binary=False)
    state = model.state_dict()
    path = tmp_path / "file"
    torch.save(prefixed(state), path)
    assert (
        inspected(path).format == "weights in the format of BNext's authors (a bare state dict), torch.save"
    )
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert inspected(path).format.endswith("(a bare state dict), torch.save")
    safetensors.torch.save_file(prefixed(state), path)
    assert inspected(path).format.endswith("(a bare state dict), safetensors")
    torch.save(training_checkpoint(state), path)
    found = inspected(path)
    assert found.format == "training checkpoint in the format of BNext's authors, torch.save"
    assert (found.facts["epoch"], found.facts["best_top1_acc"]) == (511, 72.4)
    torch.save(with_clip_values(state), path)
    found = inspected(path)
    assert found.format == "weights of the quantized variant of BNext's authors, torch.save"
    assert found.facts["dropped"] == 2
    assert found.published


def test_our_checkpoints_say_whether_they_are_fine_tuned_and_what_they_carry(tmp_path: Path) -> None:
    found = inspected(ours(tmp_path, toy(), metadata={"accuracy": '{"top1": 90.0, "n": 10}'}))
    assert (found.format, found.published) == ("bnext-qat checkpoint, float rest", False)
    assert (found.size, found.widths, found.num_classes) == ("custom", WIDTHS, 10)
    assert found.facts["accuracy"] == {"top1": 90.0, "n": 10}
    assert (found.facts["task"], found.facts["mean"]) == ("finetune", [0.5, 0.5, 0.5])
    assert found.facts["versions"]["torch"] == str(torch.__version__)
    assert inspected(ours(tmp_path, calibrated())).format == "bnext-qat checkpoint, fine-tuned"


def test_a_published_size_is_named_and_has_its_published_number_of_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = BNext(1000).state_dict()
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in shapes.items()}
    for key in state:
        if key.endswith("temperature"):
            state[key].fill_(1.0)
    path = tmp_path / "tiny.pth"
    torch.save(prefixed(state), path)
    found = inspected(path)
    totals = found.totals()
    assert (found.size, found.num_classes, len(found.binary_layers)) == ("tiny", 1000, 31)
    counters = sum(value.numel() for key, value in state.items() if key.endswith("num_batches_tracked"))
    buffers = ("running_mean", "running_var", "temperature")
    statistics = sum(value.numel() for key, value in state.items() if key.endswith(buffers))
    # The published counts are of parameters alone.
    assert totals["binary"].count == 28_253_184
    assert totals["rest"].count + totals["other"].count - counters - statistics == 2_609_052
    # All latent weights are 0, which no temperature makes ±1.
    assert "of which 0 % are exactly ±1" in verdict(found).line


# Numbers.


@pytest.mark.parametrize("temperature", [1.0, 0.1, 1e-7])
def test_shares_and_ranges_of_latent_weights_are_those_of_a_direct_computation(
    temperature: float, tmp_path: Path
) -> None:
    model = toy(binary=False)
    with torch.no_grad():
        for conv in binary_convolutions(model).values():
            conv.temperature.fill_(temperature)
        weight = model.get_submodule(f"{CONV}.binary_conv").weight
        weight.view(-1)[:5] = torch.tensor([1.0, -1.0, 1.5, -1.25, 0.0])
    torch.save(prefixed(model.state_dict()), tmp_path / "w.pth")
    found = layers(inspected(tmp_path / "w.pth"))
    for name, conv in binary_convolutions(model).items():
        layer = found[name.removesuffix(".binary_conv")]
        latent = conv.weight.detach()
        used = (latent / torch.tensor(temperature)).clamp(-1, 1)
        assert layer.values == (float(latent.min()), float(latent.max()))
        assert layer.exact_stored == sum(abs(w) == 1 for w in latent.view(-1).tolist()) / latent.numel()
        assert layer.exact_in_use == sum(abs(w) == 1 for w in used.view(-1).tolist()) / latent.numel()
        assert layer.temperature == float(torch.tensor(temperature))
        assert (layer.stored, layer.bits, layer.size) == ("float32", 32, 4 * latent.numel())
        assert layer.shapes == (tuple(latent.shape),)
    assert found[CONV].exact_stored == 2 / 64
    # One weight is 0, which no temperature at or above 1e-7 turns into ±1.
    assert not found[CONV].binary


def test_below_the_bound_every_weight_in_use_is_a_sign(tmp_path: Path) -> None:
    model = toy()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    found = inspected(tmp_path / "w.pth")
    assert {layer.exact_in_use for layer in found.binary_layers} == {1.0}
    assert {layer.in_use for layer in found.binary_layers} == {"±1"}
    assert verdict(found).line == (
        "binary: yes in use, but stored as float32: 3,904 weights at 32 bits; 7 of 7 layers; rest float32 "
        "(qat finetune or pretrain writes them at 1 bit)"
    )


def test_latent_weights_of_one_are_binary_at_temperature_one(tmp_path: Path) -> None:
    model = toy(binary=False)
    with torch.no_grad():
        for conv in binary_convolutions(model).values():
            conv.weight.copy_(torch.where(conv.weight >= 0, 1.0, -1.0))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    found = inspected(tmp_path / "w.pth")
    assert {layer.temperature for layer in found.binary_layers} == {1.0}
    assert verdict(found).answer == "in use"


def test_packed_signs_take_one_bit_and_are_exactly_one(tmp_path: Path) -> None:
    path = ours(tmp_path, toy(), float_dtype="float16")
    found = inspected(path)
    for layer in found.binary_layers:
        assert (layer.stored, layer.bits, layer.size) == (SIGN_BITS, 1, layer.weights // 8)
        assert (layer.exact_stored, layer.exact_in_use, layer.values) == (1.0, 1.0, (-1.0, 1.0))
    assert {(layer.stored, layer.bits) for layer in found.rest_layers} == {("float16", 16)}
    assert verdict(found).line == (
        "binary: yes, 3,904 weights at 1 bit; 7 of 7 layers; rest float32, stored as float16"
    )


def test_layers_at_different_temperatures_are_told_apart(tmp_path: Path) -> None:
    model = toy()
    model.get_submodule(f"{CONV}.binary_conv").temperature.fill_(0.5)
    found = inspected(ours(tmp_path, model))
    assert {layer.name: layer.bits for layer in found.binary_layers if not layer.binary} == {CONV: 32}
    share = layers(found)[CONV].exact_in_use
    latent = model.get_submodule(f"{CONV}.binary_conv").weight.detach()
    assert share == int((latent.abs() >= 0.5).sum()) / 64
    assert verdict(found).line.startswith(
        "binary: in part: 6 of 7 layers; the temperature of the others is 0.5, "
    )


def test_scales_and_types_of_a_fine_tuned_network_are_those_of_its_quantizers(tmp_path: Path) -> None:
    model = calibrated()
    found = inspected(ours(tmp_path, model))
    by_name = layers(found)
    quantizer = WeightQuantizer(8)
    se = model.get_submodule("feature.1.Attention.se.se")
    scales = torch.cat([quantizer.scale(se[index].weight) for index in (1, 3)])
    attention = by_name["feature.1.Attention.se"]
    assert attention.scale == (float(scales.min()), float(scales.max()))
    assert attention.shapes == ((1, 8, 1, 1), (8, 1, 1, 1))
    stem = quantizer.scale(model.feature[0].conv1.weight)
    assert by_name["feature.0"].scale == (float(stem.min()), float(stem.max()))
    assert {layer.in_use for layer in found.rest_layers} == {"int8"}
    results = {layer.name: layer.result for layer in found.layers}
    assert (results["feature.0"], results[CONV], results["fc"]) == ("int8", "int8", "float32")
    assert results["feature.1.Attention.se"] == "uint8"
    assert verdict(found).line.endswith("; 7 of 7 layers; rest int8, stored as float32")


def test_a_group_left_in_float_is_said_to_be_float(tmp_path: Path) -> None:
    model = calibrated(Quantization(stem=StemGroup(enabled=False)))
    found = inspected(ours(tmp_path, model))
    assert (layers(found)["feature.0"].in_use, layers(found)["feature.0"].scale) == ("float32", None)
    assert verdict(found).line.endswith("; rest float32 and int8, stored as float32")


def test_a_network_without_channel_attention_has_none(tmp_path: Path) -> None:
    found = inspected(ours(tmp_path, toy(infor_recoupling=False)))
    assert [layer.name for layer in found.rest_layers] == ["feature.0", "fc"]
    assert [layer.kind for layer in found.layers if "FFN" not in layer.name] == [
        "stem",
        "bias 3×3",
        "scale 3×3",
        "bias 3×3",
        "classifier",
    ]


def test_every_byte_of_the_tensors_is_counted_once(tmp_path: Path) -> None:
    path = ours(tmp_path, calibrated(), float_dtype="float16")
    found = inspected(path)
    size = sum(tensor.nbytes for tensor in safetensors.torch.load_file(path).values())
    assert sum(total.size for total in found.totals().values()) == size
    assert size + found.container_size == path.stat().st_size == found.file_size


def test_half_precision_weights_of_the_authors_format_are_said_to_be_half(tmp_path: Path) -> None:
    state = toy().half().state_dict()
    torch.save(state, tmp_path / "w.pth")
    stored, metadata = stored_tensors(tmp_path / "w.pth")
    assert metadata == {}
    assert stored[f"{CONV}.binary_conv.weight"].type == "float16"
    assert {layer.bits for layer in inspected(tmp_path / "w.pth").layers} == {16}


# Refusals.


def test_another_network_is_refused_with_its_first_keys(tmp_path: Path) -> None:
    state = {f"layer{index}.weight": torch.ones(2) for index in range(6)}
    for path, save in ((tmp_path / "a", torch.save), (tmp_path / "b", safetensors.torch.save_file)):
        save(state, path)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert str(caught.value) == (
            f"{path}: not a BNext: key 'feature.0.conv1.weight' is missing; found 6 tensors: layer0.weight, "
            "layer1.weight, layer2.weight, layer3.weight, …"
        )
