"""The authors' formats: their tensors are read, code in them is not run, other files are refused."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from qat.checkpoints.format import load_checkpoint
from qat.checkpoints.loading import build
from qat.checkpoints.published import read_published
from qat.errors import CheckpointError
from tests.helpers.checkpoints import (
    all_files,
    equal,
    images,
    prefixed,
    toy,
    training_checkpoint,
    with_clip_values,
)

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
    found = read_published(tmp_path / "c")
    assert equal(found.state, dict(toy().state_dict()))
    assert (found.format, found.notes) == ("published training checkpoint", ())
    assert found.facts == {
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
    assert read_published(tmp_path / "c").facts["best_top1_acc"] == expected


@pytest.mark.parametrize(
    "value",
    [np.array([object()]), np.str_("x"), np.datetime64(0, "s"), np.void(b"x"), 10**5000],
    ids=lambda value: type(value).__name__,
)
def test_other_objects_in_the_place_of_a_number_are_no_facts(tmp_path: Path, value: object) -> None:
    torch.save({**training_checkpoint(toy().state_dict()), "best_top1_acc": value}, tmp_path / "c")
    assert "best_top1_acc" not in read_published(tmp_path / "c").facts


def test_reading_leaves_torchs_list_of_safe_types_as_it_was(tmp_path: Path) -> None:
    torch.save(training_checkpoint(toy().state_dict()), tmp_path / "c")
    before = set(torch.serialization.get_safe_globals())
    load_checkpoint(tmp_path / "c")
    assert set(torch.serialization.get_safe_globals()) == before


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
    # torch's own message would advise to switch `weights_only` off.
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
        (_write(b"x"), r"c: not a checkpoint: it begins like neither a safetensors nor a torch file$"),
        (
            _write(b"task: finetune\nseed: 1\n"),
            "not a checkpoint: .* neither a safetensors nor",
        ),
        (
            _write(b"checkpoint: a.pth\nseed: 1\n"),
            "not a checkpoint: .* neither a safetensors nor",
        ),
        (_write(b"\x80\x02 and nothing else"), "not a readable checkpoint"),
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
        for path in all_files(tmp_path):
            build(load_checkpoint(path))
    assert not caught
