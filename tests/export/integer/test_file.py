"""Networks as files: what is written comes back bit for bit, without torch, and what can't is not written."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from qat_export.graphs.portable import emit_portable
from qat_export.integer.file import load_network, save_network
from qat_export.integer.network import IntegerNetwork
from qat_export.integer.reference import Interpreter

from qat.errors import CheckpointError, OutputError
from tests.helpers.network_changes import at, changed, differences
from tests.helpers.networks import lowered, make_extreme, ordinary, pixels, quantization, toy
from tests.helpers.paths import ROOT

SIGN_BITS = "blocks.1.spatial.conv.sign_bits"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file of the ordinary network."""
    path = tmp_path / "network.safetensors"
    save_network(ordinary()[1], path)
    return path


def network_of(seed: int, *, extreme: bool = False, **options: Any) -> IntegerNetwork:
    model = toy(seed, **options)
    if extreme:
        make_extreme(model, seed)
    return lowered(model)


def assert_comes_back(network: IntegerNetwork, path: Path) -> None:
    """Every field, and the logits of random images."""
    save_network(network, path)
    back = load_network(path)
    assert list(differences(network, back)) == []
    images = pixels(5, 3, 13).numpy()
    assert Interpreter(back)(images).tobytes() == Interpreter(network)(images).tobytes()


# What comes back.


@pytest.mark.parametrize("elm_attention", [True, False])
@pytest.mark.parametrize("infor_recoupling", [True, False])
@pytest.mark.parametrize("extreme", [True, False])
def test_every_kind_of_sub_block_comes_back_bit_for_bit(
    tmp_path: Path, elm_attention: bool, infor_recoupling: bool, extreme: bool
) -> None:
    options = {"elm_attention": elm_attention, "infor_recoupling": infor_recoupling}
    assert_comes_back(network_of(1, extreme=extreme, **options), tmp_path / "network")


@pytest.mark.parametrize("seed", range(2, 6))
def test_extreme_parameters_come_back_bit_for_bit(tmp_path: Path, seed: int) -> None:
    assert_comes_back(network_of(seed, extreme=True, stem_stride=1 + seed % 2), tmp_path / "network")


@pytest.mark.parametrize("bits", [2, 3, 6])
def test_every_width_of_grids_and_weights_comes_back_bit_for_bit(tmp_path: Path, bits: int) -> None:
    settings = quantization(
        trunk=bits, se=bits, classifier=bits, se_weight=bits, stem_weight=bits, fc_weight=bits
    )
    assert_comes_back(network_of(0, bits=settings), tmp_path / "network")


def test_weights_whose_last_byte_is_not_full_come_back_bit_for_bit(tmp_path: Path) -> None:
    assert_comes_back(network_of(0, widths=(3, 3, 6)), tmp_path / "network")


def test_texts_and_floats_come_back_whatever_they_hold(tmp_path: Path) -> None:
    network = replace(
        ordinary()[1],
        architecture="",
        mean=(-0.0, 5e-324, 0.1 + 0.2),
        class_names=("Glühwürmchen", "", "\0\n\"'{}\\", "\ud800", *"abcdef"),
        metadata={"": "", "recipe": '{"a": 1}\n', "ключ": "値", "z": "first", "a": "last"},
    )
    assert_comes_back(network, tmp_path / "network")


def test_a_loaded_network_does_not_depend_on_its_file(saved: Path) -> None:
    network = load_network(saved)
    saved.write_bytes(bytes(saved.stat().st_size))
    saved.unlink()
    assert list(differences(ordinary()[1], network)) == []


def test_what_is_emitted_from_a_loaded_network_has_the_same_bytes(saved: Path) -> None:
    _, network, model = ordinary()
    assert emit_portable(network).SerializeToString(deterministic=True) == model.SerializeToString(
        deterministic=True
    )
    again = emit_portable(load_network(saved))
    assert again.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


# What is written.


def test_the_tensors_are_the_arrays_of_the_description_under_dotted_names(saved: Path) -> None:
    tensors = safetensors.numpy.load_file(saved)
    network = ordinary()[1]
    expected = {
        "stem.conv.weight",
        "blocks.0.pointwise.1.conv.threshold",
        "blocks.1.spatial.residual_slopes.integers",
        "blocks.2.spatial.attention.table",
        SIGN_BITS,
        "blocks.0.spatial.branch.offset",
        "head.classifier.multiplier",
    }
    assert expected <= tensors.keys()
    assert not [
        name for name in tensors if name.endswith(("branch.gain", "blocks.0.spatial.residual_slopes"))
    ]
    for name, tensor in tensors.items():
        array = at(network, name)
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_saving_twice_gives_the_same_bytes_also_from_what_was_loaded(saved: Path) -> None:
    first = saved.read_bytes()
    save_network(load_network(saved), saved)
    assert saved.read_bytes() == first


def test_neither_the_layout_of_arrays_in_memory_nor_the_order_of_facts_shows_in_the_bytes(
    tmp_path: Path,
) -> None:
    network = replace(ordinary()[1], metadata={"a": "1", "b": "2"})
    other = replace(network, metadata={"b": "2", "a": "1"})
    for name in ("stem.conv.weight", "blocks.0.spatial.attention.expand.weight", "head.classifier.weight"):
        other = changed(other, name, np.asfortranarray)
    every_second = np.repeat(network.stem.conv.bias, 2)[::2]
    other = changed(other, "stem.conv.bias", every_second)
    other = changed(other, "head.classifier.bias", lambda bias: bias.astype(bias.dtype.newbyteorder()))
    assert not other.stem.conv.weight.flags.c_contiguous
    save_network(network, tmp_path / "one")
    save_network(other, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert list(differences(network, load_network(tmp_path / "two"))) == []


FRESH = """
import sys
from pathlib import Path
import numpy as np
from qat_export.integer.file import load_network, save_network
from qat_export.integer.reference import Interpreter
from qat_export.integer.listing import describe
folder = Path(sys.argv[1])
network = load_network(folder / "network.safetensors")
np.save(folder / "logits.npy", Interpreter(network)(np.load(folder / "images.npy")))
save_network(network, folder / "again.safetensors")
(folder / "listing.txt").write_text(f"{network}\\n{describe(network)}", encoding="utf-8")
loaded = {name.partition(".")[0] for name in sys.modules}
print(*sorted(loaded & {"torch", "onnx", "onnxruntime", "pydantic"}))
"""


@pytest.mark.parametrize("hash_seed", ["0", "7"])
def test_a_fresh_process_without_torch_loads_runs_prints_and_saves_a_network(
    saved: Path, hash_seed: str
) -> None:
    images = pixels(6, 2, 16).numpy()
    np.save(saved.with_name("images.npy"), images)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(saved.parent)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed},
    )
    assert done.stdout == "\n", "heavy packages were loaded"
    logits = np.load(saved.with_name("logits.npy"))
    assert logits.tobytes() == Interpreter(ordinary()[1])(images).tobytes()
    assert saved.with_name("again.safetensors").read_bytes() == saved.read_bytes()
    assert "feature.1.Attention" in saved.with_name("listing.txt").read_text(encoding="utf-8")


# What is not written.


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stem.conv.multiplier", lambda m: m * np.float32("nan"), r"stem\.conv\.multiplier: holds NaN"),
        ("head.input.scale", float("inf"), r"head\.input\.scale: inf, expected a finite"),
        ("head.input.scale", 1, r"head\.input\.scale: found 1, expected a number with a point"),
        ("stem.conv.bias", lambda b: b.astype(np.int64), r"stem\.conv\.bias: found int64, expected int32"),
        ("metadata", {"path": Path("x")}, r"metadata\['path'\]: found .*Path.*, expected a text"),
        ("class_names", ("a",), r"class_names: 1, but"),
    ],
)
def test_a_network_that_could_not_be_read_back_is_not_written(
    tmp_path: Path, path: str, value: Any, message: str
) -> None:
    target = tmp_path / "network"
    with pytest.raises(CheckpointError, match=rf"^{target}: not written: {message}"):
        save_network(changed(ordinary()[1], path, value), target)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(CheckpointError):
        save_network(replace(ordinary()[1], image_size=0), saved)
    assert saved.read_bytes() == before


def test_a_path_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        save_network(ordinary()[1], tmp_path)
