"""State files are read as they were written, damage of any kind is found, and old ones are removed."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.errors import CheckpointError, OutputError
from qat.evaluation import Accuracy
from qat.train.state_file import (
    Record,
    Running,
    newest_state,
    remove_leftovers,
    remove_states,
    write_state,
)


def record(epoch: int = 0, step: int = 0, **fields: Any) -> Record:
    return Record(
        recipe={"task": "pretrain"},
        facts={"class_names": "[]"},
        threads=1,
        device="cpu",
        epoch=epoch,
        running=Running(step=step),
        **fields,
    )


def tensors() -> dict[str, Tensor]:
    return {
        "model/weight": torch.tensor([[1.5, -0.0], [math.nan, math.inf]]),
        "model/count": torch.tensor(7),
        "model/half": torch.tensor([1.0], dtype=torch.bfloat16),
        "random/cpu": torch.arange(9, dtype=torch.uint8),
    }


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "state").iterdir())


def test_a_state_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    accuracy = Accuracy(12.5, 50.0, 8, 0.1 + 0.2)
    written = record(
        2,
        5,
        rows=[{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 1 / 3}],
        accuracy=accuracy,
        best=Accuracy(25.0, 50.0, 8, math.inf),
        best_epoch=1,
        accuracies={"float": accuracy},
        seconds=1e-9,
        scheduler={"last_epoch": 9, "lr_lambdas": [None], "_last_lr": [0.1]},
        learning_rates=[1e-3 / 7],
        quantizers={"fc.input": (True, False)},
    )
    write_state(tmp_path, written, tensors(), 2)
    state = newest_state(tmp_path, pytest.fail)
    assert state is not None
    assert state.record == written
    assert state.source.name == "00002-0000005.safetensors"
    assert state.tensors.keys() == tensors().keys()
    for key, value in tensors().items():
        found = state.tensors[key]
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        bits = [one.reshape(-1).view(torch.uint8).tolist() for one in (found, value)]
        assert bits[0] == bits[1]


@given(st.floats(width=64))
def test_every_number_comes_back_bit_for_bit(number: float) -> None:
    written = record(learning_rates=[number]).model_copy(update={"running": Running(loss_sum=number)})
    read = Record.model_validate_json(written.model_dump_json())
    for found in (read.running.loss_sum, read.learning_rates[0]):
        assert (
            math.isnan(found) if math.isnan(number) else struct.pack("d", found) == struct.pack("d", number)
        )


def test_the_newest_are_kept_and_the_one_that_says_what_run_it_is(tmp_path: Path) -> None:
    write_state(tmp_path, record(), {}, 1)
    for epoch, step in ((0, 0), (0, 9), (0, 10), (1, 0), (10, 0)):
        write_state(tmp_path, record(epoch, step), tensors(), 3)
    kept = [f"{position}.safetensors" for position in ("00000-0000010", "00001-0000000", "00010-0000000")]
    assert names(tmp_path) == [*kept, "begun.safetensors"]
    state = newest_state(tmp_path, pytest.fail)
    assert state is not None
    assert state.record.epoch == 10
    write_state(tmp_path, record(10, 1), tensors(), 1)
    assert names(tmp_path) == ["00010-0000001.safetensors", "begun.safetensors"]


def test_states_from_beyond_a_run_that_fell_back_are_removed_once_it_saves(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        write_state(tmp_path, record(epoch), tensors(), 3)
    write_state(tmp_path, record(1, 4), tensors(), 3)
    assert names(tmp_path) == ["00001-0000000.safetensors", "00001-0000004.safetensors"]


def test_a_new_beginning_removes_no_state(tmp_path: Path) -> None:
    write_state(tmp_path, record(1), tensors(), 1)
    write_state(tmp_path, record(), {}, 1)
    assert names(tmp_path) == ["00001-0000000.safetensors", "begun.safetensors"]


def test_a_run_without_states_has_none(tmp_path: Path) -> None:
    assert newest_state(tmp_path, pytest.fail) is None
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "notes.txt").write_text("x", encoding="utf-8")
    assert newest_state(tmp_path, pytest.fail) is None


def test_any_flipped_byte_or_cut_is_damage_and_the_state_before_is_taken(tmp_path: Path) -> None:
    write_state(tmp_path, record(1), tensors(), 2)
    write_state(tmp_path, record(2, seconds=1.0), tensors(), 2)
    path = tmp_path / "state" / "00002-0000000.safetensors"
    whole = path.read_bytes()
    damaged = [whole[:length] for length in (0, 1, 8, 100, len(whole) - 1)] + [b"x" * len(whole)]
    damaged += [
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        for at in range(0, len(whole), len(whole) // 150)
    ]
    for content in damaged:
        path.write_bytes(content)
        warnings: list[str] = []
        state = newest_state(tmp_path, warnings.append)
        assert state is not None
        if state.record.epoch == 2:  # padding of the file's header has no meaning
            assert state.record == record(2, seconds=1.0)
            assert not warnings
        else:
            assert [warning.startswith(f"{path}: ") for warning in warnings] == [True]
            assert len(warnings[0].splitlines()) == 1
    path.write_bytes(whole)
    assert newest_state(tmp_path, pytest.fail) is not None


def test_a_state_of_a_newer_version_is_refused_rather_than_passed_over(tmp_path: Path) -> None:
    write_state(tmp_path, record(1), tensors(), 2)
    newer = record(2).model_copy(update={"format_version": 2})
    write_state(tmp_path, newer, tensors(), 2)
    with pytest.raises(
        CheckpointError, match=r"00002-0000000\.safetensors: has format version 2; .* up to 1"
    ):
        newest_state(tmp_path, pytest.fail)


def test_a_whole_file_that_is_no_state_is_passed_over(tmp_path: Path) -> None:
    negative = Running.model_construct(seen=-1)
    write_state(tmp_path, record(1).model_copy(update={"running": negative}), tensors(), 2)
    warnings: list[str] = []
    assert newest_state(tmp_path, warnings.append) is None
    assert "not a state: " in warnings[0]


def test_a_state_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match="state"):
        write_state(tmp_path, record(1), tensors(), 2)


def test_states_are_removed_with_their_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "best.safetensors").write_bytes(b"x")
    write_state(tmp_path, record(1), tensors(), 2)
    remove_states(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]
    remove_states(tmp_path)


def test_files_that_are_no_states_stay(tmp_path: Path) -> None:
    write_state(tmp_path, record(1), tensors(), keep=1)
    (tmp_path / "state" / "notes.txt").touch()
    remove_states(tmp_path)
    assert names(tmp_path) == ["notes.txt"]


def test_only_files_half_written_are_leftovers(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    kept = [tmp_path / ".hidden", tmp_path / ".notes.tmp", tmp_path / "state" / "00001-0000000.safetensors"]
    for path in (*kept, tmp_path / ".0123456789abcdef.tmp", tmp_path / "state" / ".fedcba9876543210.tmp"):
        path.write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
