"""This package's checkpoint format: a network that is written and read again is the same."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from qat.checkpoints.format import file_hash, load_checkpoint, save_checkpoint
from qat.checkpoints.header import FORMAT
from qat.checkpoints.loading import build
from qat.errors import CheckpointError
from qat.models.bnext import binary_convolutions
from qat.quantize.preparation import quantization_map
from qat.recipe.schema import Quantization
from tests.helpers.checkpoints import CONV, calibrated, equal, images, recipe, toy


def test_a_binary_network_comes_back_with_its_signs(saved: Path) -> None:
    model, checkpoint = toy(), load_checkpoint(saved)
    assert (checkpoint.format, checkpoint.architecture) == (FORMAT, model.architecture)
    assert torch.equal(build(checkpoint)(images()), model(images()))
    weight = model.state_dict()[CONV]
    assert torch.equal(checkpoint.state[CONV], torch.where(weight >= 0, 1.0, -1.0))
    rest = {key for key in checkpoint.state if not key.endswith("binary_conv.weight")}
    assert equal({key: checkpoint.state[key] for key in rest}, {key: model.state_dict()[key] for key in rest})


def test_sign_bits_are_big_endian_in_c_order_with_plus_one_and_both_zeros_as_one(tmp_path: Path) -> None:
    model = toy(widths=(1, 1))
    weight = binary_convolutions(model)["feature.1.Attention.binary_conv"].weight
    with torch.no_grad():
        weight.copy_(torch.tensor([0.5, -0.5, 0.0, -0.0, -1, -1, -1, 1, 1]).view(1, 1, 3, 3))
    save_checkpoint(tmp_path / "c", model, recipe=None)
    stored = safetensors.torch.load_file(tmp_path / "c")[f"{CONV}.sign_bits"]
    assert stored.tolist() == [0b10110001, 0b10000000]
    assert load_checkpoint(tmp_path / "c").state[CONV].flatten().tolist() == [1, -1, 1, 1, -1, -1, -1, 1, 1]


def test_the_latent_magnitude_can_be_chosen(saved: Path) -> None:
    assert load_checkpoint(saved, latent=0.25).state[CONV].abs().unique().tolist() == [0.25]


@pytest.mark.parametrize("latent", [0.0, -1.0, float("nan"), float("inf")])
def test_a_latent_magnitude_that_loses_the_signs_is_refused(saved: Path, latent: float) -> None:
    with pytest.raises(CheckpointError, match="latent"):
        load_checkpoint(saved, latent=latent)


def test_latent_weights_are_kept_where_they_matter(tmp_path: Path) -> None:
    model = toy(binary=False)
    save_checkpoint(tmp_path / "c", model, recipe=None, float_dtype="float16")
    assert torch.equal(load_checkpoint(tmp_path / "c").state[CONV], model.state_dict()[CONV])


def test_one_temperature_decides_for_one_convolution(tmp_path: Path) -> None:
    model = toy()
    binary_convolutions(model)["feature.1.Attention.binary_conv"].temperature.fill_(1e-7)
    save_checkpoint(tmp_path / "c", model, recipe=None)
    stored = safetensors.torch.load_file(tmp_path / "c")
    assert CONV in stored
    assert "feature.1.FFN.binary_conv.weight.sign_bits" in stored


def test_float16_stores_the_matrices_in_half_precision_and_nothing_else(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", calibrated(), recipe=None, float_dtype="float16")
    stored = safetensors.torch.load_file(tmp_path / "c")
    half = {key for key, value in stored.items() if value.dtype == torch.float16}
    blocks = [f"feature.{i}.{name}" for i, name in [(1, "Attention"), (1, "FFN"), (2, "FFN_1"), (2, "FFN_2")]]
    assert {"feature.0.conv1.weight", "fc.weight"} < half
    assert {f"{block}.se.se.{i}.weight" for block in blocks for i in (1, 3)} < half
    # Eight channels are reduced to one, so that a matrix of the attention has the shape of a vector. Matrices
    # are stored as float16, vectors as float32.
    assert stored["feature.1.FFN.se.se.1.weight"].shape == stored["feature.1.FFN.scale"].shape == (1, 8, 1, 1)
    assert all(key.endswith(("conv1.weight", "se.1.weight", "se.3.weight", "fc.weight")) for key in half)
    state = load_checkpoint(tmp_path / "c").state
    assert not any(value.dtype == torch.float16 for value in state.values())
    assert torch.allclose(state["fc.weight"], toy().state_dict()["fc.weight"], rtol=1e-3, atol=1e-6)


def test_float16_is_refused_when_a_value_does_not_fit_it(tmp_path: Path) -> None:
    model = toy()
    with torch.no_grad():
        model.fc.weight[0, 0] = 70000
    with pytest.raises(CheckpointError, match=r"fc\.weight: a value of 70000 does not fit float16"):
        save_checkpoint(tmp_path / "c", model, recipe=None, float_dtype="float16")
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path / "c", model, recipe=None)


def test_a_network_with_nan_is_not_written(tmp_path: Path) -> None:
    model = toy()
    with torch.no_grad():
        model.get_parameter(CONV)[0, 0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=f"{CONV}: holds NaN"):
        save_checkpoint(tmp_path / "c", model, recipe=None)


def test_an_infinite_scale_is_refused(tmp_path: Path) -> None:
    model = calibrated()
    key = next(key for key in model.state_dict() if key.startswith("feature.1.trunk_mid.") and "scale" in key)
    model.state_dict()[key].fill_(float("inf"))
    with pytest.raises(CheckpointError, match=f"{key}: holds an infinity"):
        save_checkpoint(tmp_path / "c", model, recipe=None)


def test_types_other_than_float_are_kept(saved: Path) -> None:
    state = load_checkpoint(saved).state
    assert state["feature.0.bn1.num_batches_tracked"].dtype == torch.int64
    assert {value.dtype for value in state.values()} == {torch.int64, torch.float32}


def test_a_network_in_double_precision_is_stored_in_single(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", toy().double(), recipe=None)
    save_checkpoint(tmp_path / "b", toy(), recipe=None)
    assert equal(load_checkpoint(tmp_path / "a").state, load_checkpoint(tmp_path / "b").state)


def test_recipe_quantization_and_metadata_come_back(tmp_path: Path) -> None:
    quantization = Quantization.model_validate({"se": {"weight_bits": 4}, "exclude": ["fc"]})
    model = calibrated(quantization)
    save_checkpoint(tmp_path / "c", model, recipe=recipe(), metadata={"top1": "72.4"})
    checkpoint = load_checkpoint(tmp_path / "c")
    assert checkpoint.recipe == recipe()
    assert checkpoint.quantization == quantization
    assert checkpoint.metadata == {"top1": "72.4"}
    assert checkpoint.quantization_map == json.loads(json.dumps(quantization_map(model)))


def test_equal_networks_give_equal_bytes_in_every_process(tmp_path: Path) -> None:
    metadata = {f"fact {i}": str(i) for i in range(20)}
    save_checkpoint(tmp_path / "a", calibrated(), recipe=recipe(), metadata=metadata)
    save_checkpoint(tmp_path / "b", calibrated(), recipe=recipe(), metadata=metadata)
    assert file_hash(tmp_path / "a") == file_hash(tmp_path / "b")
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        # There is one entry, so that no order depends on the seed of Python's hashes.
        assert list(file.metadata()) == [FORMAT]
    again = (
        "import sys; from pathlib import Path;"
        "from qat.checkpoints.format import load_checkpoint, save_checkpoint;"
        "from qat.checkpoints.loading import build; a, b = map(Path, sys.argv[1:]);"
        "c = load_checkpoint(a); save_checkpoint(b, build(c), recipe=c.recipe, metadata=c.metadata)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", again, str(tmp_path / "a"), str(tmp_path / "c")], check=True, env=environment
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def test_saving_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model = calibrated()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "c", model, recipe=None, float_dtype="float16")
    assert equal(before, model.state_dict())


def test_a_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_hash(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(CheckpointError, match="absent"):
        file_hash(tmp_path / "absent")
