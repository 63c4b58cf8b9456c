"""Files of ``torch.save``, read without running anything: the archives, and the older single streams.

An archive is a zip file whose records are stored as they are: ``NAME/data.pkl`` describes the content, and
``NAME/data/KEY`` holds the numbers of one storage each. The older files are pickles in a row (a magic number,
a version, facts about the machine, the content, the keys of the storages), followed for each key by a count
of 8 bytes and the numbers.
"""

from __future__ import annotations

import math
import mmap
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qat.checkpoints.pickle_values import Global, StorageRecord, TensorRecord
from qat.checkpoints.unpickling import unpickle
from qat.errors import CheckpointError

#: How the archives begin, and the older files (a pickle of protocol 2 or later).
ZIP: Final = b"PK\x03\x04"
PICKLE: Final = b"\x80"
#: The first two pickles of an older file.
_MAGIC: Final = 0x1950A86A20F9469CFC6C
_VERSION: Final = 1001
#: Bytes of a record's header in a zip file, before its name.
_ZIP_HEADER: Final = 30
_TYPES: Final = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_PLAIN: Final = {
    str(dtype): dtype
    for dtype in (
        *_TYPES.values(),
        torch.uint16,
        torch.uint32,
        torch.uint64,
    )
}


@dataclass(frozen=True)
class TorchFile:
    """A file of ``torch.save``.

    Attributes:
        path: of the file.
        size: its bytes.
        content: what was saved, see :mod:`qat.checkpoints.pickle_values`.
        storages: where the numbers of each storage lie: first byte in the file, and how many bytes.
        big_endian: whether the most significant byte of a number comes first.
    """

    path: Path
    size: int
    content: Any
    storages: Mapping[str, tuple[int, int]]
    big_endian: bool = False

    def tensors(self, records: Mapping[str, object]) -> dict[str, Tensor]:
        """The tensors by key, on the CPU, contiguous and independent of the file.

        Args:
            records: their descriptions in ``content``.

        Raises:
            CheckpointError: one is no plain dense tensor, or the file has fewer bytes than they need.
            OSError: the file can't be read any more.
        """
        budget = self.size
        found: dict[str, Tensor] = {}
        with self.path.open("rb") as file:
            for key, record in records.items():
                try:
                    first, count, dtype = self._place(record)
                except ValueError as error:
                    raise CheckpointError(f"{key[:100]!r}: {error}") from error
                assert isinstance(record, TensorRecord)
                # Views of one storage are no weights, and could describe far more than the file holds.
                budget -= count * dtype.itemsize
                if budget < 0:
                    raise CheckpointError(f"{key[:100]!r}: its tensors need more bytes than the file has")
                file.seek(first)
                data = bytearray(count * dtype.itemsize)
                file.readinto(data)
                flat = (
                    torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
                )
                if self.big_endian:
                    flat.untyped_storage().byteswap(dtype)  # type: ignore[no-untyped-call]
                found[key] = flat.as_strided(record.shape, record.stride).contiguous()
        return found

    def _place(self, record: object) -> tuple[int, int, torch.dtype]:
        """First byte of a tensor in the file, how many numbers it spans, and their type."""
        if not isinstance(record, TensorRecord):
            raise ValueError("expected a plain dense tensor")
        storage = record.storage
        dtype = _PLAIN.get(record.dtype or str(_TYPES.get(storage.type.rpartition(".")[2])))
        numbers = (record.offset, *record.shape, *record.stride)
        if dtype is None or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("expected a plain dense tensor")
        if len(record.shape) != len(record.stride) or len(record.shape) > 8:
            raise ValueError("expected a plain dense tensor")
        needed = math.prod(record.shape)
        span = 1 + sum((side - 1) * step for side, step in zip(record.shape, record.stride, strict=True))
        if not needed:
            return 0, 0, dtype
        if storage.key not in self.storages:
            raise ValueError(f"its record data/{storage.key[:20]} is missing")
        first, size = self.storages[storage.key]
        said = (storage.start + storage.count) * _item_size(storage)
        if said > size:
            raise ValueError(
                f"cut short: its record data/{storage.key[:20]} has {size} of {said} bytes; "
                "copy or download the file again"
            )
        begin = storage.start * _item_size(storage) + record.offset * dtype.itemsize
        if needed > span or begin + span * dtype.itemsize > said:
            raise ValueError("expected a plain dense tensor")  # expanded, or beyond its storage
        return first + begin, span, dtype


def read_torch_file(path: Path) -> TorchFile:
    """Read what a file of ``torch.save`` says about its content.

    Raises:
        CheckpointError: it holds something else, which the message names.
        Exception: of almost any kind, where it is damaged.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        if view[:4] == ZIP:
            return _read_archive(path, view)
        return _read_stream(path, view)


def _read_archive(path: Path, view: mmap.mmap) -> TorchFile:
    places: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise CheckpointError(
                    f"its record {record.filename[:100]!r} is compressed, which torch.save never does; load "
                    "it where it comes from and torch.save it again"
                )
            places[record.filename] = _after_header(view, record)
    folders = [name.removesuffix("data.pkl") for name in places if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise CheckpointError("not a readable checkpoint: a zip archive, but not one of torch.save")
    (folder,) = folders
    if f"{folder}constants.pkl" in places:
        raise CheckpointError(
            "a TorchScript model, whose code would have to run; save its weights alone: "
            "torch.save(model.state_dict(), …)"
        )

    def read(name: str) -> bytes:
        first, size = places[folder + name]
        return view[first : first + size]

    content = unpickle(_Source(read("data.pkl")), _storage)
    storages = {
        name.removeprefix(f"{folder}data/"): place
        for name, place in places.items()
        if name.startswith(f"{folder}data/")
    }
    order = read("byteorder") if f"{folder}byteorder" in places else b"little"
    return TorchFile(path, len(view), content, storages, order == b"big")


def _after_header(view: mmap.mmap, record: zipfile.ZipInfo) -> tuple[int, int]:
    """First byte of a record and how many: the directory says where its header begins."""
    begin = record.header_offset
    header = view[begin : begin + _ZIP_HEADER]
    first = begin + _ZIP_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    if not header.startswith(ZIP) or first + record.file_size > len(view):
        raise ValueError(f"record {record.filename[:100]!r} lies outside of the file")
    return first, record.file_size


def _read_stream(path: Path, view: mmap.mmap) -> TorchFile:
    source = _Source(view)
    if unpickle(source, _storage) != _MAGIC or unpickle(source, _storage) != _VERSION:
        raise CheckpointError("a pickle, but not a file of torch.save; save the state dict with torch.save")
    machine = unpickle(source, _storage)
    types: dict[str, StorageRecord] = {}

    def persistent(identifier: Any) -> Any:
        if identifier[0] in ("module", b"module"):
            return identifier[1]
        found = _storage(identifier)
        types[found.key] = found
        return found

    content = unpickle(source, persistent)
    keys = unpickle(source, _storage)
    storages = {}
    place = source.tell()
    for key in keys:
        size = int.from_bytes(view[place : place + 8], "little") * _item_size(types[_text(key)])
        storages[_text(key)] = (place + 8, min(size, len(view) - place - 8))
        place += 8 + size
    # Later storages would show it too, but whoever reads none of them shall be told as well.
    if place > len(view):
        raise ValueError("cut short")
    return TorchFile(path, len(view), content, storages, machine.get("little_endian") is False)


def _storage(identifier: Any) -> StorageRecord:
    """A storage from its identifier: its class, key, device and count, and in older files a part of it."""
    name, kind, key, _, count, *part = identifier
    if _text(name) != "storage" or not isinstance(kind, Global) or type(count) is not int or count < 0:
        raise ValueError("a reference to something else than a storage")
    start = 0
    if part and part[0] is not None:
        _, start, count = part[0]
        if type(start) is not int or type(count) is not int or min(start, count) < 0:
            raise ValueError("a reference to something else than a storage")
    return StorageRecord(kind.name, _text(key), count, start)


def _item_size(storage: StorageRecord) -> int:
    """Bytes of a number.

    Raises:
        ValueError: such a storage isn't known.
    """
    dtype = _TYPES.get(storage.type.rpartition(".")[2])
    if dtype is None:
        raise ValueError(f"numbers of type {storage.type[:100]} are not read")
    return dtype.itemsize


def _text(value: object) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


class _Source:
    """Bytes read one piece after the other, never more than there are."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data = data
        self.place = 0

    def tell(self) -> int:
        """How many bytes were read."""
        return self.place

    def read(self, count: int) -> bytes:
        """The next bytes."""
        found = self.data[self.place : self.place + count]
        self.place += len(found)
        return found

    def readline(self) -> bytes:
        """The next bytes up to a line feed."""
        end = self.data.find(b"\n", self.place)
        return self.read((len(self.data) if end < 0 else end + 1) - self.place)
