"""Files that are no networks, damaged or contradict themselves: each is refused by tensor or field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qat_export.integer.fields import digest
from qat_export.integer.file import FORMAT, load_network, save_network

from qat.checkpoints.format import save_checkpoint
from qat.errors import CheckpointError
from tests.helpers.networks import ordinary

SIGN_BITS = "blocks.1.spatial.conv.sign_bits"
#: What a test does to the tensors and the header of a file.
Change = Callable[[dict[str, Any], dict[str, Any]], object]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file of the ordinary network."""
    path = tmp_path / "network.safetensors"
    save_network(ordinary()[1], path)
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with safetensors.safe_open(path, "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()[FORMAT])  # noqa: SIM118


def with_digests(node: Any, tensors: dict[str, Any], name: str = "") -> Any:
    """A header's tree with the digest of every tensor as it is now."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    parts = {key: with_digests(part, tensors, f"{name}.{key}".lstrip(".")) for key, part in pairs}
    if isinstance(node, dict | list):
        return parts if isinstance(node, dict) else list(parts.values())
    return digest(tensors[name]) if name in tensors else node


def edit(path: Path, change: Change, *, rehash: bool = True) -> None:
    """Rewrite a file after ``change(tensors, header)``; with the digests that are right then, if asked."""
    tensors, header = read(path)
    change(tensors, header)
    if rehash:
        if "network" in header:
            header["network"] = with_digests(header["network"], tensors)
        header.pop("sha256")
        text = json.dumps(header, sort_keys=True, separators=(",", ":"))
        header["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_bytes(safetensors.numpy.save(tensors, {FORMAT: json.dumps(header)}))


def test_an_edited_file_with_right_digests_is_read(saved: Path) -> None:
    def change(tensors: dict[str, Any], header: dict[str, Any]) -> None:
        tensors["head.classifier.bias"] += 1
        header["network"]["class_names"][0] = "other"

    edit(saved, change)
    network = load_network(saved)
    assert network.class_names[0] == "other"
    np.testing.assert_array_equal(network.head.classifier.bias, ordinary()[1].head.classifier.bias + 1)


def refused(path: Path) -> str:
    """What is said of a file, without its name; one line that a terminal can show."""
    with pytest.raises(CheckpointError) as caught:
        load_network(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", [SIGN_BITS, "stem.conv.weight", "head.classifier.multiplier"])
def test_a_damaged_tensor_is_refused_by_name(saved: Path, name: str) -> None:
    def change(tensors: dict[str, Any], header: dict[str, Any]) -> None:
        tensors[name].view(np.uint8).reshape(-1)[-1] ^= 1

    edit(saved, change, rehash=False)
    assert refused(saved).startswith(f"{name}: the tensor is damaged: its SHA-256 is ")


def test_a_damaged_number_in_the_metadata_is_refused(saved: Path) -> None:
    def change(tensors: dict[str, Any], header: dict[str, Any]) -> None:
        header["network"]["head"]["slopes"]["shift"] -= 1

    edit(saved, change, rehash=False)
    assert refused(saved).startswith("its metadata is damaged: its SHA-256 is ")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_refused(saved: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    # As often in the header as in the tensors, though it is much shorter.
    low, high = data.draw(st.sampled_from([(0, 7), (8, header - 1), (header, len(content) - 1)]))
    position = data.draw(st.integers(low, high))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    damaged = saved.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    refused(damaged)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_cut_short_or_prolonged_is_refused(saved: Path, data: st.DataObject) -> None:
    content = saved.read_bytes()
    cut = saved.with_name("cut.safetensors")
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert refused(cut).startswith("not a safetensors file, damaged or cut short: ")
    cut.write_bytes(content + b"\0")
    assert refused(cut).startswith("not a safetensors file, damaged or cut short: ")


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    model, _, graph = ordinary()
    path = tmp_path / "file"
    assert refused(path) == "no such file"
    assert refused(tmp_path) == "not a regular file"
    for content in (b"", b"some text\n", b"PK\x03\x04", graph.SerializeToString()):
        path.write_bytes(content)
        assert refused(path).startswith("not a safetensors file, damaged or cut short: ")
    save_checkpoint(path, model, recipe=None)
    assert refused(path) == "not an integer network: its metadata has no key 'bnext-qat integer network'"
    path.write_bytes(safetensors.numpy.save({"x": np.zeros(3)}))
    assert refused(path).startswith("not an integer network: ")


def test_a_file_without_permission_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(safetensors, "safe_open", no)
    assert refused(saved) == "cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its metadata is not JSON: "),
        ("[" * 5000 + "]" * 5000, "its metadata is not JSON: "),
        ("[]", "its metadata has no format version"),
        ("{}", "its metadata has no format version"),
        ('{"format_version": true}', "its metadata has no format version"),
        ('{"format_version": 0}', "its metadata has no format version"),
        ('{"format_version": 2}', "has format version 2; this bnext-qat "),
        ('{"format_version": ' + "9" * 4000 + "}", "has format version 99999999999999999999; "),
        ('{"format_version": 1}', "its metadata is damaged: its SHA-256 is "),
        ('{"format_version": 1, "sha256": [1]}', "its metadata is damaged: its SHA-256 is "),
        ('{"format_version": NaN}', "its metadata is not JSON: NaN is no finite number"),
        ('{"format_version": -Infinity}', "its metadata is not JSON: -Infinity is no finite number"),
        ('{"format_version": 1e999}', "its metadata is not JSON: 1e999 is no finite number"),
        ('{"format_version": ' + "9" * 5000 + "}", "its metadata is not JSON: "),
    ],
    ids=range(14),
)
def test_metadata_that_is_no_header_is_refused(saved: Path, text: str, message: str) -> None:
    saved.write_bytes(safetensors.numpy.save({"x": np.zeros(3)}, {FORMAT: text}))
    assert refused(saved).startswith(message)


def delete(name: str) -> Change:
    return lambda tensors, header: tensors.pop(name)


def tensor(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda tensors, header: tensors.update({name: np.ascontiguousarray(change(tensors[name]))})


def field(path: str, value: Any) -> Change:
    def change(tensors: dict[str, Any], header: dict[str, Any]) -> None:
        *parents, leaf = path.split(".")
        node: Any = header
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        node[leaf] = value

    return change


CONTRADICTIONS = [
    (delete(SIGN_BITS), f"{SIGN_BITS}: the tensor is missing"),
    (delete("stem.conv.bias"), "stem.conv.bias: the tensor is missing"),
    (tensor(SIGN_BITS, lambda bits: bits[:-1]), f"{SIGN_BITS}: shape [287], expected [288]"),
    (tensor(SIGN_BITS, lambda bits: bits.view(np.int8)), f"{SIGN_BITS}: found int8, expected uint8"),
    (tensor("stem.conv.weight", lambda w: w[0]), "stem.conv.weight: shape [3, 3, 3], expected [8, 3, 3, 3]"),
    (
        tensor("blocks.1.spatial.conv.threshold", lambda t: t + np.int16(500)),
        "blocks.1.spatial.conv.threshold: found ",
    ),
    (
        tensor("head.classifier.multiplier", lambda m: m * np.float32("inf")),
        "head.classifier.multiplier: holds NaN or infinity",
    ),
    (
        tensor("blocks.0.spatial.attention.table", lambda t: t[:255]),
        "blocks.0.spatial.attention.table: shape [255], expected [256]",
    ),
    (lambda t, h: t.update({"blocks.9.x\n": np.zeros(2)}), "'blocks.9.x\\n': a tensor of this"),
    (lambda t, h: t.update(extra=np.zeros((2, 2))), "'extra': a tensor of this name belongs to no field"),
    (lambda t, h: h.pop("network"), "its metadata has no network"),
    (lambda t, h: h["network"].pop("blocks"), "blocks: missing"),
    (lambda t, h: h["network"]["stem"].update(x=1), "stem: unknown key 'x'"),
    (field("network", []), "the network: found a list of 0, expected an object"),
    (field("network.image_size", 16.0), "image_size: found 16.0, expected a whole number"),
    (field("network.image_size", -1), "image_size: -1, expected at least 1"),
    (field("network.head.mean", 0.1), "head.mean: found 0.1, expected a float32 number"),
    (field("network.blocks.0.spatial.kind", "gate"), "blocks.0.spatial.kind: found 'gate', allowed: "),
    (field("network.blocks.0.spatial.kind", "scale"), "blocks.0.spatial.residual_slopes: missing, which"),
    (field("network.blocks.0.spatial.conv.stride", 0), "blocks.0.spatial.conv.stride: 0, allowed: 1, 2"),
    (field("network.blocks.1.spatial.y_grid.bits", 10**30), "blocks.1.spatial.y_grid.bits: 1000"),
    (field("network.blocks.1.spatial.y_grid.scale", 0.0), "blocks.1.spatial.y_grid.scale: 0.0, expected"),
    (field("network.blocks.1.spatial.branch_multiplier.shift", -(10**30)), "blocks.1.spatial.branch_mul"),
    (field("network.class_names", ["a"] * 9), "class_names: 9, but the classifier (head.cl"),
    (field("network.mean", [0.0, 0.0]), "mean: found a list of 2, expected a list of 3"),
    (field("network.metadata", {"a": 1}), "metadata['a']: found 1, expected a text"),
]


@pytest.mark.parametrize(("change", "message"), CONTRADICTIONS, ids=[text for _, text in CONTRADICTIONS])
def test_a_file_that_contradicts_itself_is_refused_by_tensor_or_field(
    saved: Path, change: Change, message: str
) -> None:
    edit(saved, change)
    assert refused(saved).startswith(message)
