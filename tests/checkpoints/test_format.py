"""Our checkpoint format: what is written comes back, and damage is refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat.checkpoints.format import (
    FORMAT,
    as_stored,
    file_hash,
    infer_architecture,
    load_checkpoint,
    save_checkpoint,
    tensors_hash,
)
from qat.checkpoints.loading import build
from qat.errors import CheckpointError
from qat.models.bnext import BNext, binary_convolutions
from qat.quantize.preparation import quantization_map
from qat.recipe.schema import Quantization
from tests.helpers.checkpoints import CONV, WIDTHS, all_files, calibrated, equal, images, recipe, toy

#: sha256 over the sorted lines "key shape" of the authors' BNext-Tiny with 1000 classes.
TINY_LAYOUT = "818c3c1dd891d3d69cd8f304a366d9fc52207755365aaca3efd9c56219fe3d09"


def edit(
    path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object], rehash: bool = True
) -> Path:
    """Rewrite one of our checkpoints after ``change(tensors, header)``, with the hash of the new tensors."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()[FORMAT])
    change(tensors, header)
    if rehash:
        header["tensors_sha256"] = tensors_hash(tensors)
    path.write_bytes(safetensors.torch.save(tensors, {FORMAT: json.dumps(header)}))
    return path


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
        # With one entry there is no order that a hash seed could change.
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


def test_the_hash_is_over_names_types_shapes_and_bytes_in_the_order_of_the_names() -> None:
    tensors = {"b": torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).T, "a": torch.tensor(True)}
    text = b'["a","bool",[]]\n\x01["b","int16",[2,2]]\n' + bytes([1, 0, 3, 0, 2, 0, 4, 0])
    assert tensors_hash(tensors) == hashlib.sha256(text).hexdigest()
    assert tensors_hash(dict(reversed(tensors.items()))) == tensors_hash(tensors)


def _rename(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    a, b = "feature.0.bn1.running_mean", "feature.0.bn1.running_var"
    tensors[a], tensors[b] = tensors[b], tensors[a]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: t["fc.bias"].neg_(), "its tensors are damaged: their SHA-256 is [0-9a-f]{12}…"),
        (lambda t, h: t.update({"fc.bias": t["fc.bias"].double()}), "its tensors are damaged"),
        (lambda t, h: t.update({"fc.bias": t["fc.bias"][None]}), "its tensors are damaged"),
        (_rename, "its tensors are damaged"),
        (lambda t, h: h.update(tensors_sha256="0" * 64), "its tensors are damaged"),
        (lambda t, h: h.pop("tensors_sha256"), "tensors_sha256: Field required"),
        (lambda t, h: h.update(tensors_sha256=None), "tensors_sha256"),
    ],
)
def test_tensors_other_than_those_written_are_refused(
    saved: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object], message: str
) -> None:
    load_checkpoint(edit(saved, lambda tensors, header: None, rehash=False))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(edit(saved, change, rehash=False))
    assert str(caught.value).startswith(f"{saved}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quant", [False, True])
def test_every_flipped_byte_of_the_tensors_is_found(tmp_path: Path, quant: bool) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, toy(quant, widths=(2, 2)), recipe=recipe())
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    load_checkpoint(path)
    # Every 29th: over 8-byte integers and 4-byte floats, all positions of a byte in its value come up.
    for offset in [*range(start, len(content), 29), len(content) - 1]:
        damaged = bytearray(content)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="its tensors are damaged"):
            load_checkpoint(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "9" * 5000])
def test_metadata_that_is_no_json_object_is_refused(saved: Path, text: str) -> None:
    saved.write_bytes(safetensors.torch.save(safetensors.torch.load_file(saved), {FORMAT: text}))
    with pytest.raises(CheckpointError, match="its metadata"):
        load_checkpoint(saved)


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
    return [(path.name, path.read_bytes()) for path in all_files(tmp_path_factory.mktemp("samples"))]


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


@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("float_dtype", ["float32", "float16"])
def test_a_network_as_stored_is_the_network_that_comes_back(
    tmp_path: Path, float_dtype: Literal["float32", "float16"], quant: bool
) -> None:
    model = toy(quant=quant)
    save_checkpoint(tmp_path / "c", model, recipe=recipe(), float_dtype=float_dtype)
    back, stored = build(load_checkpoint(tmp_path / "c")), as_stored(model, float_dtype)
    binary = {f"{name}.weight" for name in binary_convolutions(model)}
    assert all(
        torch.equal(value, stored.state_dict()[key])
        for key, value in back.state_dict().items()
        if key not in binary
    )
    same = torch.equal(model.fc.weight, stored.fc.weight)
    assert same == (float_dtype == "float32"), "half precision rounds, and leaves the network itself alone"
