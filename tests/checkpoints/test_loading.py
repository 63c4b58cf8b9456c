"""Checkpoints become networks: all that doesn't fit is reported, and what fits computes the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qat.checkpoints.format import Checkpoint, load_checkpoint, save_checkpoint
from qat.checkpoints.loading import (
    architecture_of,
    build,
    highest_temperature,
    load_state,
    without_quantizers,
)
from qat.errors import CheckpointError
from qat.models.bnext import Architecture, BNext, binary_convolutions
from qat.quantize.preparation import quantization_map
from qat.recipe.schema import Quantization
from tests.helpers.checkpoints import WIDTHS, calibrated, equal, images, recipe, toy


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "toy.safetensors"
    save_checkpoint(path, toy(), recipe=None)
    return path


# Loading into a network


def test_every_mismatch_is_reported_at_once_and_nothing_is_loaded(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    state = dict(checkpoint.state)
    del state["prelu.weight"]
    state["surprise\n"] = torch.ones(1)
    state["feature.0.bn1.weight"] = torch.ones(9)
    state["feature.0.bn1.num_batches_tracked"] = torch.tensor(0.0)
    state["feature.0.bn1.bias"] = torch.full((8,), float("nan"))
    state["fc.bias"] = torch.full((10,), float("-inf"))
    model = toy(binary=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_state(model, replace(checkpoint, state=state))
    assert str(caught.value).splitlines() == [
        f"{saved}: does not fit the network:",
        "  1 key missing: prelu.weight",
        "  1 key unexpected: 'surprise\\n'",
        "  1 key of another shape: feature.0.bn1.weight (checkpoint [9], network [8])",
        "  1 key of another type: feature.0.bn1.num_batches_tracked (checkpoint float32, network int64)",
        "  2 keys with values that are not finite: "
        "fc.bias (holds an infinity), feature.0.bn1.bias (holds NaN)",
    ]
    assert equal(before, model.state_dict())
    load_state(model, checkpoint)


def test_a_negative_variance_is_refused(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    checkpoint.state["feature.1.FFN.norm2.running_var"][0] = -1e-3
    with pytest.raises(CheckpointError, match=r"1 key with negative variances: feature\.1\.FFN\.norm2\.runn"):
        load_state(toy(), checkpoint)


def test_architectures_that_differ_are_told_in_words_and_long_lists_are_cut(saved: Path) -> None:
    with torch.device("meta"):
        tiny = BNext()
    with pytest.raises(CheckpointError) as caught:
        load_state(tiny, load_checkpoint(saved))
    message = str(caught.value)
    assert (
        "the checkpoint is BNext custom [8, 8, 16, 16], 10 classes, stem stride 1; "
        "the network is BNext tiny, 1000 classes, stem stride 2" in message
    )
    assert " keys missing: " in message
    assert " more\n" in message
    assert len(message) < 4000


def test_a_stem_stride_that_differs_is_refused_only_where_the_file_knows_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ours", toy(), recipe=None)
    torch.save(toy().state_dict(), tmp_path / "published")
    load_state(toy(stem_stride=2), load_checkpoint(tmp_path / "published"))
    with pytest.raises(CheckpointError, match=r"stem stride 1; the network is .* stem stride 2"):
        load_state(toy(stem_stride=2), load_checkpoint(tmp_path / "ours"))


def test_a_complex_tensor_is_refused(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    state = {**checkpoint.state, "fc.bias": torch.ones(10, dtype=torch.complex64)}
    with pytest.raises(CheckpointError, match=r"fc\.bias \(checkpoint complex64, network float32\)"):
        load_state(toy(), replace(checkpoint, state=state))


def test_a_value_too_large_for_the_networks_type_is_refused(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    load_state(toy().half(), checkpoint)
    state = {**checkpoint.state, "fc.bias": torch.full((10,), 1e5)}
    with pytest.raises(CheckpointError, match=r"fc\.bias \(a value of 100000 does not fit float16\)"):
        load_state(toy().half(), replace(checkpoint, state=state))


def test_a_float_checkpoint_goes_into_a_prepared_network(saved: Path) -> None:
    model = toy(quant=True, binary=False)
    load_state(model, load_checkpoint(saved))
    assert float(model.state_dict()["feature.1.Attention.binary_conv.temperature"]) < 1e-7


def test_a_float_checkpoint_with_a_missing_key_does_not_go_into_a_prepared_network(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    del checkpoint.state["fc.bias"]
    with pytest.raises(CheckpointError, match=r"1 key missing: fc\.bias"):
        load_state(toy(quant=True), checkpoint)


def test_a_quantized_checkpoint_does_not_go_into_a_float_network(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", calibrated(), recipe=None)
    with pytest.raises(CheckpointError, match="of a quantized network; the network is in float") as caught:
        load_state(toy(), load_checkpoint(tmp_path / "c"))
    assert "keys unexpected: " in str(caught.value)
    load_state(toy(), without_quantizers(load_checkpoint(tmp_path / "c")))


def test_a_quantized_checkpoint_with_a_part_of_its_quantizers_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", calibrated(), recipe=None)
    checkpoint = load_checkpoint(tmp_path / "c")
    scale = next(key for key in checkpoint.state if key.startswith("feature.1.trunk_mid."))
    del checkpoint.state[scale]
    with pytest.raises(CheckpointError, match=f"1 key missing: {scale}"):
        load_state(toy(quant=True), checkpoint)
    bare = replace(checkpoint, state=without_quantizers(checkpoint).state)
    with pytest.raises(CheckpointError, match=r"\d+ keys missing: feature\.0\.trunk"):
        load_state(toy(quant=True), bare)


def test_scales_of_other_bits_are_refused_though_the_keys_are_equal(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", calibrated(), recipe=None)
    checkpoint = load_checkpoint(tmp_path / "c")
    four_bits = Quantization.model_validate({"se": {"activation_bits": 4}})
    with pytest.raises(CheckpointError, match=r"quantization\.se\.activation_bits 8; the network with 4"):
        load_state(toy(quant=four_bits), checkpoint)
    load_state(toy(quant=Quantization.model_validate({"se": {"averaging_constant": 0.5}})), checkpoint)


# Building


@pytest.mark.parametrize("observer", ["moving_average", "minmax", "histogram"])
def test_a_calibrated_network_computes_the_same_after_a_round_trip(tmp_path: Path, observer: str) -> None:
    # Only one point gets a histogram, since each takes a second.
    model = calibrated(Quantization.model_validate({"classifier": {"observer": observer}}))
    save_checkpoint(tmp_path / "c", model, recipe=recipe())
    again = build(load_checkpoint(tmp_path / "c"))
    assert not again.training
    assert torch.equal(again(images()), model(images()))
    assert not torch.equal(again(images()), toy()(images()))


def test_an_uncalibrated_network_survives_a_round_trip(tmp_path: Path) -> None:
    # Its observers saw no values yet, so their minimum and maximum are infinite.
    save_checkpoint(tmp_path / "c", toy(quant=True), recipe=None)
    assert torch.equal(build(load_checkpoint(tmp_path / "c"))(images()), toy(quant=True)(images()))


def test_a_quantized_checkpoint_can_be_built_in_float(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", calibrated(), recipe=None)
    model = build(without_quantizers(load_checkpoint(tmp_path / "c")))
    assert torch.equal(model(images()), toy()(images()))
    assert quantization_map(model) == {}


def test_a_quantized_checkpoint_is_built_with_its_grids(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", calibrated(), recipe=None)
    model = build(load_checkpoint(tmp_path / "c"))
    assert quantization_map(model) == quantization_map(calibrated())


def test_the_architecture_of_a_recipe_is_that_of_its_network() -> None:
    model = recipe().model.model_copy(update={"num_classes": 10})
    assert architecture_of(model) == toy().architecture
    left_open = model.model_copy(update={"num_classes": None})
    assert architecture_of(left_open, 10) == toy().architecture
    assert architecture_of(left_open, 10, 2) == toy(stem_stride=2).architecture
    other = model.model_copy(update={"stem_stride": 2, "infor_recoupling": False})
    assert architecture_of(other) == toy(stem_stride=2, infor_recoupling=False).architecture


def test_the_highest_temperature_is_that_of_the_softest_convolution() -> None:
    model = toy()
    assert highest_temperature(model) == pytest.approx(1e-9)
    binary_convolutions(model)["feature.2.FFN_1.binary_conv"].temperature.fill_(0.5)
    assert highest_temperature(model) == 0.5


def test_building_uses_no_random_numbers(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", calibrated(), recipe=None)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build(load_checkpoint(tmp_path / "c"))
    assert torch.equal(torch.rand(1), expected)


def test_a_checkpoint_that_cannot_be_prepared_is_refused(saved: Path) -> None:
    quantization = Quantization.model_validate({"exclude": ["nowhere"]})
    with pytest.raises(CheckpointError, match=r"cannot be prepared: .*'nowhere' matches no module"):
        build(replace(load_checkpoint(saved), quantization=quantization))


def test_a_checkpoint_made_in_memory_builds() -> None:
    model = toy()
    checkpoint = Checkpoint(Architecture.of(num_classes=10, widths=WIDTHS), model.state_dict())
    assert torch.equal(build(checkpoint)(images()), model(images()))
