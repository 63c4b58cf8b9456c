from __future__ import annotations

import collections
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat.bnext import Architecture, BNext, binary_convolutions, set_temperature
from qat.checkpoint import (
    FORMAT,
    Checkpoint,
    build,
    file_hash,
    infer_architecture,
    load_checkpoint,
    load_state,
    save_checkpoint,
    without_quantizers,
)
from qat.errors import CheckpointError, OutputError
from qat.files import write_atomically
from qat.prepare import calibrate, quantization_map
from qat.published import read_published
from qat.recipe import Quantization, Recipe, parse_recipe

WIDTHS = (8, 8, 16, 16)
CONV = "feature.1.Attention.binary_conv.weight"
#: sha256 over the sorted lines "key shape" of the authors' BNext-Tiny with 1000 classes.
TINY_LAYOUT = "818c3c1dd891d3d69cd8f304a366d9fc52207755365aaca3efd9c56219fe3d09"


def toy(quant: bool | Quantization = False, binary: bool = True, **options: Any) -> BNext:
    torch.manual_seed(0)
    model = BNext(**{"num_classes": 10, "widths": WIDTHS, **options}, quant=quant)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "running_mean", "running_var")) and tensor.is_floating_point():
                tensor.uniform_(0.1, 1.0)
    if binary:
        set_temperature(model, 1e-9)
    return model.eval()


def calibrated(quantization: Quantization | None = None, **options: Any) -> BNext:
    model = toy(quantization or Quantization(), **options)

    def forward() -> None:
        model(images())

    calibrate(model, forward)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def recipe() -> Recipe:
    mapping = {
        "task": "finetune",
        "model": {"checkpoint": "start.safetensors", "widths": list(WIDTHS)},
        "data": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
        "quantization": {},
    }
    return parse_recipe(mapping, "test")


def prefixed(state: dict[str, Tensor]) -> collections.OrderedDict[str, Tensor]:
    return collections.OrderedDict((f"module.{key}", value) for key, value in state.items())


def training_checkpoint(state: dict[str, Tensor]) -> dict[str, object]:
    return {
        "epoch": 511,
        "state_dict": prefixed(state),
        "best_top1_acc": np.float64(72.4),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}},
            "param_groups": [],
        },
        "temp": torch.tensor(1e-9),
        "alpha": 0.5,
        "losses": [1.0, np.float32(0.5)],
    }


def with_clip_values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "feature.0.conv1.activation_clip_val": torch.ones(1), "fc.scale": torch.ones(1)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


def edit(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> Path:
    """Rewrite one of our checkpoints after ``change(tensors, header)``."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()[FORMAT])
    change(tensors, header)
    path.write_bytes(safetensors.torch.save(tensors, {FORMAT: json.dumps(header)}))
    return path


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost these tiny networks more than they give, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "toy.safetensors"
    save_checkpoint(path, toy(), recipe=None)
    return path


# Layout and architecture


def test_the_keys_and_shapes_of_tiny_are_those_of_the_published_checkpoint() -> None:
    with torch.device("meta"):
        state = BNext().state_dict()
    assert len(state) == 661
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == TINY_LAYOUT


@pytest.mark.parametrize(
    "options",
    [
        {"size": "tiny"},
        {"size": "small", "num_classes": 10},
        {"size": "middle", "num_classes": 100},
        {"size": "large"},
        {"widths": WIDTHS, "elm_attention": False},
        {"widths": WIDTHS, "infor_recoupling": False},
        {"widths": (4, 8), "num_classes": 2, "elm_attention": False, "infor_recoupling": False},
    ],
)
def test_the_architecture_is_inferred_from_keys_and_shapes(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = BNext(**options)
    assert infer_architecture(model.state_dict()) == model.architecture


def test_the_architecture_of_a_prepared_network_is_that_of_its_float_network() -> None:
    assert infer_architecture(toy(quant=True).state_dict()) == toy().architecture


def test_the_stem_stride_can_be_given_since_no_key_tells() -> None:
    assert infer_architecture(toy().state_dict(), stem_stride=2).stem_stride == 2


@pytest.mark.parametrize(
    "missing",
    ["feature.0.conv1.weight", CONV, "feature.1.FFN.binary_conv.weight", "fc.weight"],
)
def test_a_state_that_is_no_bnext_is_refused_with_the_missing_key(missing: str) -> None:
    state = {key: value for key, value in toy().state_dict().items() if key != missing}
    with pytest.raises(CheckpointError, match=f"not a BNext: key '{missing}' is missing"):
        infer_architecture(state)


def test_a_gap_between_blocks_is_refused() -> None:
    state = {key.replace("feature.3.", "feature.4."): value for key, value in toy().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"feature\.3\.Attention"):
        infer_architecture(state)


@pytest.mark.parametrize("shape", [(), (9, 9, 3, 3), (0, 8, 3, 3)])
def test_shapes_that_no_network_has_are_refused(shape: tuple[int, ...]) -> None:
    state = {**toy().state_dict(), CONV: torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=CONV):
        infer_architecture(state)


def test_a_stem_of_no_channels_is_refused() -> None:
    state = {key: value[:0] if value.ndim else value for key, value in toy().state_dict().items()}
    with pytest.raises(CheckpointError, match="not a BNext: widths"):
        infer_architecture(state)


# Our format


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


@pytest.mark.parametrize(("binary", "keep_latent"), [(False, False), (True, True)])
def test_latent_weights_are_kept_where_they_matter(tmp_path: Path, binary: bool, keep_latent: bool) -> None:
    model = toy(binary=binary)
    save_checkpoint(tmp_path / "c", model, recipe=None, keep_latent=keep_latent, float_dtype="float16")
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
    # Eight channels reduce to one: the SE matrix then has the shape of the vectors, which stay.
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
        # With one entry there is no order that a hash seed could change.
        assert list(file.metadata()) == [FORMAT]
    again = (
        "import sys; from pathlib import Path; from qat.checkpoint import *; a, b = map(Path, sys.argv[1:]);"
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


# Damage to our format


def _drop_bits(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors[f"{CONV}.sign_bits"] = tensors[f"{CONV}.sign_bits"][:-1].clone()


def _both(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors[CONV] = torch.ones(8, 8, 3, 3)


def _set_padding(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    key = "feature.1.FFN.binary_conv.weight"
    header["sign_bits"][key] = [8, 7, 1, 1]
    tensors[f"{key}.sign_bits"] = torch.full((7,), 255, dtype=torch.uint8)
    header["sign_bits"][CONV] = [1, 1, 1, 575]
    tensors[f"{CONV}.sign_bits"][-1] = 1


def _quantized_in_disguise(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["feature.1.trunk_mid.scale"] = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h.update(format_version=2), "format version 2; this bnext-qat .* reads up to 1"),
        (lambda t, h: h.pop("format_version"), "no format version"),
        (lambda t, h: h.update(format_version=True), "no format version"),
        (lambda t, h: h.pop("architecture"), "architecture: Field required"),
        (lambda t, h: h.update(surprise=1), "surprise"),
        (lambda t, h: h["architecture"].update(num_classes="10"), r"architecture\.num_classes"),
        (
            lambda t, h: h["architecture"].update(num_classes=11),
            "says it is .* 11 classes.* are .* 10 classes",
        ),
        (lambda t, h: h["architecture"].update(widths=[8, 9]), "9 after 8"),
        (lambda t, h: h["architecture"].update(stem_stride=3), "stem stride 3"),
        (lambda t, h: h.update(metadata={"top1": 72.4}), r"metadata\.top1"),
        (lambda t, h: h.update(recipe={"task": "finetun"}), "settings are not valid"),
        (lambda t, h: h.update(quantization={"se": {"weight_bits": 99}}), "settings are not valid"),
        (lambda t, h: h["sign_bits"].pop(CONV), "sign bits and recorded shapes disagree"),
        (lambda t, h: t.pop(f"{CONV}.sign_bits"), "sign bits and recorded shapes disagree"),
        (lambda t, h: h["sign_bits"].update({CONV: [8, 8]}), "sign_bits"),
        (lambda t, h: h["sign_bits"].update({CONV: [8, 8, 3, -3]}), "sign_bits"),
        (
            lambda t, h: h["sign_bits"].update({CONV: [8, 8, 3, 4]}),
            r"found uint8 \[72\], expected uint8 \[96\]",
        ),
        (lambda t, h: t.update({f"{CONV}.sign_bits": torch.ones(72)}), r"found float32 \[72\]"),
        (_drop_bits, r"found uint8 \[71\], expected uint8 \[72\] for shape \[8, 8, 3, 3\]"),
        (_both, "stored twice"),
        (_set_padding, "bits are set beyond the last weight"),
        (_quantized_in_disguise, r"float network, but .*feature\.1\.trunk_mid\.scale"),
        (lambda t, h: t.pop("fc.weight"), r"'fc\.weight' is missing"),
    ],
)
def test_a_contradiction_in_the_file_is_refused(
    saved: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object], message: str
) -> None:
    load_checkpoint(edit(saved, lambda tensors, header: None))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(edit(saved, change))
    assert str(caught.value).startswith(f"{saved}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "9" * 5000])
def test_metadata_that_is_no_json_object_is_refused(saved: Path, text: str) -> None:
    saved.write_bytes(safetensors.torch.save(safetensors.torch.load_file(saved), {FORMAT: text}))
    with pytest.raises(CheckpointError, match="its metadata"):
        load_checkpoint(saved)


def _all_files(folder: Path) -> list[Path]:
    save_checkpoint(folder / "ours", toy(widths=(2, 2, 4)), recipe=recipe())
    save_checkpoint(folder / "prepared", toy(True, widths=(2, 2)), recipe=recipe())
    state = toy(widths=(2, 2)).state_dict()
    torch.save(prefixed(state), folder / "zip")
    torch.save(training_checkpoint(state), folder / "training")
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "plain")
    return sorted(folder.iterdir())


def _loads(path: Path) -> bool:
    """Whether the file loads; any other error than a refusal fails the test."""
    refusal = ""
    try:
        build(load_checkpoint(path))
    except CheckpointError as error:
        refusal = str(error)
    assert not refusal or refusal.startswith(str(path))
    return not refusal


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in _all_files(tmp_path_factory.mktemp("samples"))]


def test_a_truncated_file_of_any_format_is_refused(samples: list[tuple[str, bytes]], tmp_path: Path) -> None:
    for name, content in samples:
        path = tmp_path / name
        path.write_bytes(content)
        assert _loads(path), name
        for length in [0, 1, 8, 9, 100, *range(0, len(content), len(content) // 12), len(content) - 1]:
            path.write_bytes(content[:length])
            assert not _loads(path), (name, length)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_raise_anything_but_a_checkpoint_error(
    samples: list[tuple[str, bytes]], tmp_path: Path, data: st.DataObject
) -> None:
    name, content = data.draw(st.sampled_from(samples), label="format")
    damaged = bytearray(content)
    # Half of the flips hit the first 2 KiB, where the structure is.
    offsets = st.integers(0, len(content) - 1) | st.integers(0, min(len(content), 2048) - 1)
    for offset in data.draw(st.lists(offsets, min_size=1, max_size=4), label="offsets"):
        damaged[offset] ^= data.draw(st.integers(1, 255), label="flip")
    path = tmp_path / name
    path.write_bytes(damaged)
    _loads(path)


# The authors' formats


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_bare_state_dict_loads(tmp_path: Path, legacy: bool, prefix: bool) -> None:
    state = toy().state_dict()
    stored = prefixed(state) if prefix else state
    torch.save(stored, tmp_path / "c", _use_new_zipfile_serialization=not legacy)
    checkpoint = load_checkpoint(tmp_path / "c")
    assert checkpoint.format == "published weights"
    assert (checkpoint.recipe, checkpoint.quantization) == (None, None)
    assert equal(checkpoint.state, dict(state))
    assert torch.equal(build(checkpoint)(images()), toy()(images()))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_training_checkpoint_loads_with_its_facts(tmp_path: Path, legacy: bool) -> None:
    torch.save(
        training_checkpoint(toy().state_dict()), tmp_path / "c", _use_new_zipfile_serialization=not legacy
    )
    state, info = read_published(tmp_path / "c")
    assert equal(state, dict(toy().state_dict()))
    assert info == {
        "format": "published training checkpoint",
        "dropped": 0,
        "epoch": 511,
        "best_top1_acc": 72.4,
        "temp": pytest.approx(1e-9),
        "alpha": 0.5,
    }
    assert load_checkpoint(tmp_path / "c").metadata["best_top1_acc"] == "72.4"


def test_what_the_authors_quantizers_leave_behind_is_dropped_and_counted(tmp_path: Path) -> None:
    torch.save(prefixed(with_clip_values(toy().state_dict())), tmp_path / "c")
    checkpoint = load_checkpoint(tmp_path / "c")
    assert (checkpoint.format, checkpoint.metadata) == ("published quantized", {"dropped": "2"})
    assert equal(checkpoint.state, dict(toy().state_dict()))


@pytest.mark.parametrize("prefix", [False, True])
def test_a_plain_safetensors_file_loads(tmp_path: Path, prefix: bool) -> None:
    state = toy().state_dict()
    safetensors.torch.save_file(prefixed(state) if prefix else state, tmp_path / "c")
    assert equal(load_checkpoint(tmp_path / "c").state, dict(state))


def test_a_published_checkpoint_takes_the_stem_stride_it_is_given(tmp_path: Path) -> None:
    torch.save(toy(stem_stride=2).state_dict(), tmp_path / "c")
    assert load_checkpoint(tmp_path / "c").architecture.stem_stride == 1
    assert load_checkpoint(tmp_path / "c", stem_stride=2).architecture.stem_stride == 2


def test_a_published_half_precision_checkpoint_comes_back_in_single_precision(tmp_path: Path) -> None:
    torch.save(toy().half().state_dict(), tmp_path / "c")
    assert load_checkpoint(tmp_path / "c").state["fc.weight"].dtype == torch.float32


def test_weights_survive_the_removal_of_their_file(tmp_path: Path) -> None:
    torch.save(toy().state_dict(), tmp_path / "c")
    checkpoint = load_checkpoint(tmp_path / "c")
    with (tmp_path / "c").open("r+b") as file:
        file.truncate(0)
    assert equal(checkpoint.state, dict(toy().state_dict()))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (np.float64(3.5), 3.5),
        (np.float32(0.5), 0.5),
        (np.float16(2), 2.0),
        (np.int64(-7), -7),
        (np.uint8(9), 9),
        (np.bool_(True), True),
        (np.dtype(">f8").type(1.25), 1.25),
    ],
)
def test_numpy_numbers_load(tmp_path: Path, number: object, expected: object) -> None:
    torch.save({**training_checkpoint(toy().state_dict()), "best_top1_acc": number}, tmp_path / "c")
    assert read_published(tmp_path / "c")[1]["best_top1_acc"] == expected


@pytest.mark.parametrize("number", [np.array([object()]), np.str_("x"), np.datetime64(0, "s"), np.void(b"x")])
def test_other_numpy_objects_are_refused(tmp_path: Path, number: object) -> None:
    torch.save({**training_checkpoint(toy().state_dict()), "best_top1_acc": number}, tmp_path / "c")
    with pytest.raises(CheckpointError):
        read_published(tmp_path / "c")


def test_reading_leaves_torchs_list_of_safe_types_as_it_was(tmp_path: Path) -> None:
    torch.save(training_checkpoint(toy().state_dict()), tmp_path / "c")
    before = list(torch.serialization.get_safe_globals())
    load_checkpoint(tmp_path / "c")
    assert torch.serialization.get_safe_globals() == before


# Files that are no checkpoints


class _Runs:
    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _hostile(kind: str, payload: object, path: Path) -> None:
    if kind == "zip":
        torch.save({"state_dict": {"a": torch.ones(1)}, "x": payload}, path)
    elif kind == "legacy":
        torch.save({"a": torch.ones(1), "x": payload}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(payload, protocol=2 if kind == "pickle 2" else 5))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle 2", "pickle 5"])
@pytest.mark.parametrize("call", ["os.system", "eval", "open", "Path.touch"])
@pytest.mark.parametrize("forced", [False, True])
def test_code_in_a_pickle_is_refused_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, call: str, forced: bool
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trace = tmp_path / "trace"
    payload = {
        "os.system": _Runs(os.system, f"touch {trace}"),
        "eval": _Runs(eval, f"open({str(trace)!r}, 'w').close()"),
        "open": _Runs(open, str(trace), "w"),
        "Path.touch": _Runs(Path.touch, trace),
    }[call]
    _hostile(kind, payload, tmp_path / "c")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "c")
    assert str(caught.value).startswith(f"{tmp_path / 'c'}: ")
    assert "\n" not in str(caught.value)
    # torch's own advice would be to switch the protection off.
    assert "weights_only" not in str(caught.value)
    assert not trace.exists()


def test_the_kind_of_object_that_is_refused_is_named(tmp_path: Path) -> None:
    torch.save({"x": _Runs(os.system, "true")}, tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"refused: it asks to unpickle posix\.system"):
        load_checkpoint(tmp_path / "c")


def _write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _save(value: object) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (_write(b""), "is empty"),
        (_write(b"x"), "not a readable checkpoint"),
        (_write(b"task: finetune\nseed: 1\n"), "not a readable checkpoint"),
        (_write(b"PK\x03\x04 and nothing else"), "not a readable checkpoint"),
        (_write(struct.pack("<Q", 2**40) + b"{}"), "damaged or cut short safetensors"),
        (_write(struct.pack("<Q", 2) + b"{}"), "holds no tensors"),
        (_save({}), "holds no tensors"),
        (_save({"state_dict": {}}), "holds no tensors"),
        (_save({"fc.scale": torch.ones(1)}), "holds no tensors"),
        (_save([torch.ones(1)]), "found list, expected a state dict"),
        (_save(torch.ones(1)), "found Tensor, expected a state dict"),
        (_save({"epoch": 3}), "'epoch' holds no tensor but: int"),
        (_save({1: torch.ones(1)}), "not a state dict: '1'"),
        (_save({"a": torch.ones(1).to_sparse()}), "'a': expected a plain dense tensor"),
        (_save({"a": torch.ones(1).expand(10**12)}), "'a': expected a plain dense tensor"),
        (_save({"a": torch.ones(1, device="meta")}), "'a': expected a plain dense tensor"),
        (_save({"a": torch.ones(1)}), r"not a BNext: key 'feature\.0\.conv1\.weight' is missing"),
        (_save({"module.a": torch.ones(1), "b": torch.ones(1)}), "some keys have the prefix"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "c"
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_no_format_leaks_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in _all_files(tmp_path):
            build(load_checkpoint(path))
    assert not caught


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
    # One observer of that kind: the histogram takes a second each.
    model = calibrated(Quantization.model_validate({"classifier": {"observer": observer}}))
    save_checkpoint(tmp_path / "c", model, recipe=recipe())
    again = build(load_checkpoint(tmp_path / "c"))
    assert not again.training
    assert torch.equal(again(images()), model(images()))
    assert not torch.equal(again(images()), toy()(images()))


def test_an_uncalibrated_network_survives_a_round_trip(tmp_path: Path) -> None:
    # Its observers hold infinities, the marks of having seen nothing.
    save_checkpoint(tmp_path / "c", toy(quant=True), recipe=None)
    assert torch.equal(build(load_checkpoint(tmp_path / "c"))(images()), toy(quant=True)(images()))


def test_an_infinite_scale_is_refused(tmp_path: Path) -> None:
    model = calibrated()
    key = next(key for key in model.state_dict() if key.startswith("feature.1.trunk_mid.") and "scale" in key)
    model.state_dict()[key].fill_(float("inf"))
    with pytest.raises(CheckpointError, match=f"{key}: holds an infinity"):
        save_checkpoint(tmp_path / "c", model, recipe=None)


def test_a_quantized_checkpoint_can_be_built_in_float(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", calibrated(), recipe=None)
    model = build(load_checkpoint(tmp_path / "c"), quantized=False)
    assert torch.equal(model(images()), toy()(images()))
    assert quantization_map(model) == {}


def test_a_float_checkpoint_can_be_built_prepared(saved: Path) -> None:
    model = build(load_checkpoint(saved), quantized=True)
    assert quantization_map(model).keys() == quantization_map(toy(quant=True)).keys()


def test_a_network_is_prepared_for_the_normalization_of_its_recipe(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", toy(), recipe=recipe())
    image = quantization_map(build(load_checkpoint(tmp_path / "c"), quantized=True))["feature.0.image"]
    assert image["scale"] == pytest.approx(0.5 / 0.2 / 127)


def test_building_uses_no_random_numbers(saved: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build(load_checkpoint(saved), quantized=True)
    assert torch.equal(torch.rand(1), expected)


def test_a_checkpoint_that_cannot_be_prepared_is_refused(saved: Path) -> None:
    quantization = Quantization.model_validate({"exclude": ["nowhere"]})
    with pytest.raises(CheckpointError, match=r"cannot be prepared: .*'nowhere' matches no module"):
        build(replace(load_checkpoint(saved), quantization=quantization))


def test_a_checkpoint_made_in_memory_builds() -> None:
    model = toy()
    checkpoint = Checkpoint(Architecture.of(num_classes=10, widths=WIDTHS), model.state_dict())
    assert torch.equal(build(checkpoint)(images()), model(images()))


# Writing files


def test_a_file_is_written_with_its_folders_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    write_atomically(path, "één\r\n")
    assert path.read_bytes() == "één\r\n".encode()
    write_atomically(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert list(path.parent.iterdir()) == [path]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_atomically(tmp_path / "c", b"")
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "it is a folder"),
        ("fifo", "not a regular file"),
        ("file/below", "cannot be written: .+"),
        ("loop", "cannot be written: .+"),
        ("n" * 300, "name too long"),
    ],
)
def test_a_path_that_cannot_be_written_is_named_with_the_reason(
    tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=f"(?i){reason}") as caught:
        write_atomically(tmp_path / name, b"new")
    assert str(caught.value).startswith(str(tmp_path / name))
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_write_that_fails_midway_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"
