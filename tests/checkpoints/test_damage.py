"""Damaged checkpoints of our format are refused in one line."""

from __future__ import annotations

import hashlib
import json
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

from qat.checkpoints.format import as_stored, load_checkpoint, save_checkpoint, tensors_hash
from qat.checkpoints.header import FORMAT
from qat.checkpoints.loading import build
from qat.errors import CheckpointError
from qat.models.bnext import binary_convolutions
from tests.helpers.cases import combinations
from tests.helpers.checkpoints import CONV, all_files, recipe, toy


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
    # Every 29th byte, since 29 has no common factor with 4 or 8: so every byte of a float or an integer is
    # hit.
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
    """Whether the file loads. Any exception other than ``CheckpointError`` fails the test."""
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
    # Half of the flipped bytes lie in the first 2 KiB, which hold the structure of the file.
    offsets = st.integers(0, len(content) - 1) | st.integers(0, min(len(content), 2048) - 1)
    for offset in data.draw(st.lists(offsets, min_size=1, max_size=4), label="offsets"):
        damaged[offset] ^= data.draw(st.integers(1, 255), label="flip")
    path = tmp_path / name
    path.write_bytes(damaged)
    _loads(path)


@combinations({"float_dtype": ["float32", "float16"], "quant": [False, True]})
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
