"""Files of ``torch.save``: every tensor comes back as torch reads it, and damage is named."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.checkpoints.format import load_checkpoint
from qat.checkpoints.torch_files import read_torch_file
from qat.errors import CheckpointError
from tests.helpers.checkpoints import equal, prefixed, toy

BOTH = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def save(value: object, path: Path, legacy: bool = False, **options: Any) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy, **options)
    return path


def many() -> dict[str, Tensor]:
    base = torch.arange(24, dtype=torch.float32)
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64)
    return {
        **{str(kind): base[:7].to(kind) for kind in kinds},
        "uint8": torch.arange(5, dtype=torch.uint8),
        "uint16": torch.arange(5).to(torch.uint16),
        "bool": torch.tensor([True, False, True]),
        "complex": torch.tensor([1 + 2j]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.reshape(4, 6).T,
        "strided": base[3::5],
        "channels last": base.reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(base[:3].clone()),
        "of one side": base.reshape(24, 1)[:1],
    }


@BOTH
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_come_back_as_torch_reads_them(tmp_path: Path, legacy: bool, protocol: int) -> None:
    file = read_torch_file(save(many(), tmp_path / "c", legacy, pickle_protocol=protocol))
    found = file.tensors(file.content)
    assert equal(found, {key: value.detach() for key, value in many().items()})
    assert all(value.is_contiguous() and not value.requires_grad for value in found.values())


def test_numbers_of_the_other_byte_order_are_turned(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0, 3e7])
    save({"a": values}, tmp_path / "little")
    turned = struct.pack(">3f", *values.tolist())
    with zipfile.ZipFile(tmp_path / "little") as old, zipfile.ZipFile(tmp_path / "big", "w") as new:
        for name in old.namelist():
            other = {"little/byteorder": b"big", "little/data/0": turned}
            new.writestr(name, other.get(name, old.read(name)))
    file = read_torch_file(tmp_path / "big")
    assert torch.equal(file.tensors(file.content)["a"], values)


@BOTH
def test_only_what_is_asked_for_is_read(tmp_path: Path, legacy: bool) -> None:
    content = {"a": torch.ones(2), "optimizer": {"state": {0: {"exp_avg": torch.zeros(1000)}}}}
    file = read_torch_file(save(content, tmp_path / "c", legacy))
    assert file.tensors({"a": file.content["a"]})["a"].tolist() == [1, 1]


@BOTH
@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3).to_sparse(),
        torch.ones(1).expand(10**12),
        torch.ones(1, device="meta"),
        torch.view_as_complex(torch.ones(2, 2)).conj(),
    ],
    ids=["sparse", "expanded", "meta", "conjugate"],
)
def test_tensors_of_other_kinds_are_refused_where_they_are_weights(
    tmp_path: Path, value: Tensor, legacy: bool
) -> None:
    path = save({**toy().state_dict(), "fc.weight": value}, tmp_path / "c", legacy)
    with pytest.raises(CheckpointError, match=r"c: 'fc\.weight': expected a plain dense tensor"):
        load_checkpoint(path)
    assert equal(
        load_checkpoint(save({"x": value, "model": toy().state_dict()}, path)).state, toy().state_dict()
    )


def test_one_storage_for_many_tensors_is_not_copied_for_each(tmp_path: Path) -> None:
    base = torch.zeros(1000)
    file = read_torch_file(save({str(i): base[i : 900 + i] for i in range(100)}, tmp_path / "c"))
    with pytest.raises(CheckpointError, match="need more bytes than the file has"):
        file.tensors(file.content)


def _rewritten(
    path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    """The archive with changed records."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records.items():
            new.writestr(name, change(name, data))
    return path


def test_a_record_shorter_than_its_tensor_is_named(tmp_path: Path) -> None:
    path = save(toy().state_dict(), tmp_path / "c")
    _rewritten(path, lambda name, data: data[:4] if name.endswith("data/0") else data)
    with pytest.raises(
        CheckpointError, match=r"c: 'feature\.0\.conv1\.weight': cut short: .* data/0 has 4 of 864 "
    ):
        load_checkpoint(path)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    path = save(toy().state_dict(), tmp_path / "c")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "d", "w") as new:
        for name in old.namelist():
            if not name.endswith("data/3"):
                new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="its record data/3 is missing"):
        load_checkpoint(tmp_path / "d")


def test_compressed_records_are_refused_by_the_directory_alone(tmp_path: Path) -> None:
    path = save(toy().state_dict(), tmp_path / "c")
    _rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(
        CheckpointError, match=r"c: its record '.*' is compressed, which torch\.save never does"
    ):
        load_checkpoint(path)


def test_a_record_outside_of_the_file_is_refused(tmp_path: Path) -> None:
    path = save(toy().state_dict(), tmp_path / "c")
    content = path.read_bytes()
    # The last record of the directory: its size and its compressed size.
    place = content.rindex(b"PK\x01\x02") + 20
    path.write_bytes(content[:place] + struct.pack("<II", 2**31, 2**31) + content[place + 8 :])
    with pytest.raises(CheckpointError, match=r"not a readable checkpoint.* lies outside of the file"):
        load_checkpoint(path)


def test_other_zip_files_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(CheckpointError, match=r"a zip archive, but not one of torch\.save"):
        load_checkpoint(tmp_path / "c")


def test_a_torchscript_model_is_refused_with_what_to_save_instead(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "c", "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"):
            archive.writestr(name, b"\x80\x02}.")
    with pytest.raises(CheckpointError, match=r"TorchScript model.*torch\.save\(model\.state_dict\(\)"):
        load_checkpoint(tmp_path / "c")


def test_a_state_dict_of_pickle_dump_is_refused_with_what_to_use(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(pickle.dumps(toy().state_dict(), 2))
    with pytest.raises(CheckpointError, match=r"a pickle, but not a file of torch\.save"):
        load_checkpoint(tmp_path / "c")


@BOTH
def test_a_whole_model_is_refused_with_what_to_save_instead(tmp_path: Path, legacy: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    for content, place in ((model, ""), ({"epoch": 3, "model": model}, "model: ")):
        path = save(content, tmp_path / "c", legacy)
        expected = (
            f"{path}: {place}holds a whole model (torch.nn.modules.container.Sequential), which takes the "
            "code it comes from to read; save its weights alone: torch.save(model.state_dict(), …)"
        )
        with pytest.raises(CheckpointError, match=f"^{re.escape(expected)}$"):
            load_checkpoint(path)


def test_a_state_dict_beside_a_whole_model_is_taken(tmp_path: Path) -> None:
    content = {"model": nn.Linear(2, 2), "state_dict": prefixed(toy().state_dict())}
    assert equal(load_checkpoint(save(content, tmp_path / "c")).state, toy().state_dict())
